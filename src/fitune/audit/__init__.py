"""Is our path right for every causal language model of the installed transformers?"""
