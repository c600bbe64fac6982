"""Wordings of each form that are never trained: paraphrases with other constructions of the same words.

Placeholders are those of phrasings.py.
"""

from __future__ import annotations

HELD_OUT: dict[str, tuple[str, ...]] = {
    "column": (
        "Print every {row}'s {c}.",
        "I would like to see the {c} of all our {rows}.",
        "Could you give me the {c} of each {row}, please?",
    ),
    "two_columns": (
        "For all {rows} I would like to see the {c} and the {d}.",
        "Print {c} and {d} of each {row}.",
        "Could you show me every {row} with its {c} and its {d}?",
    ),
    "distinct": (
        "Without repeats, which {cs} do the {rows} have?",
        "I want a list of the distinct {cs} among all {rows}.",
        "Tell me all the different {cs} of the {rows}.",
    ),
    "equals": (
        "Print the {c} for every {row} whose {f} equals {v}.",
        "I am looking for {rows} with {v} as their {f}; show me the {c}.",
        "Where the {f} is {v}, what {c} do the {rows} have?",
    ),
    "greater": (
        "Print the {c} for every {row} whose {n} exceeds {v}.",
        "I am looking for {rows} with {a_n} greater than {v}; show me the {c}.",
        "Of all {rows}, which have {a_n} higher than {v}? Return their {c}.",
    ),
    "less": (
        "Print the {c} for every {row} whose {n} is below {v}.",
        "I am looking for {rows} with {a_n} smaller than {v}; show me the {c}.",
        "Of all {rows}, which have {a_n} lower than {v}? Return their {c}.",
    ),
    "between": (
        "Print the {c} for every {row} whose {n} lies in the range from {v} to {w}.",
        "I am looking for {rows} with {a_n} between {v} and {w}; show me the {c}.",
        "Where the {n} is at least {v} and at most {w}, what {c} do the {rows} have?",
    ),
    "starts_with": (
        "Print the {c} for every {row} whose {f} is starting with {v}.",
        "I am looking for {rows} with {a_f} beginning with {v}; show me the {c}.",
        "Tell me the {c} of any {row} with {a_f} that starts with {v}.",
    ),
    "contains": (
        "Print the {c} for every {row} whose {f} has {v} somewhere in it.",
        "Tell me the {c} of any {row} with {v} in its {f}.",
        "Where the {f} includes {v}, what {c} do the {rows} have?",
    ),
    "missing": (
        "Print the {c} for every {row} with no {f}.",
        "Of all {rows}, which have no {f}? Return their {c}.",
        "Where the {f} is missing, what {c} do the {rows} have?",
    ),
    "one_of": (
        "Print the {c} for every {row} whose {f} is one of {v} and {w}.",
        "Tell me the {c} of all {rows} that have {v} or {w} as {f}.",
        "Where the {f} is either {v} or {w}, what {c} do the {rows} have?",
    ),
    "both": (
        "Print the {c} for every {row} that has {f} {v} and also {a_n} greater than {w}.",
        "I am looking for {rows} with {v} as their {f} and {a_n} above {w}; show me the {c}.",
        "Where the {f} is {v} and the {n} is over {w}, what {c} do the {rows} have?",
    ),
    "either": (
        "Print the {c} for every {row} that has {f} {v} or else {g} {w}.",
        "I am looking for {rows} with {v} as their {f} or {w} as their {g}; show me the {c}.",
        "Where the {f} is {v} or the {g} is {w}, what {c} do the {rows} have?",
    ),
    "sorted_up": (
        "Print the {c} of every {row} by ascending {n}.",
        "I would like all {rows} sorted by {n} with the {low} first; show the {c}.",
        "In order of increasing {n}, what is the {c} of each {row}?",
    ),
    "sorted_down": (
        "Print the {c} of every {row} by descending {n}.",
        "I would like all {rows} sorted by {n} with the {high} first; show the {c}.",
        "In order of decreasing {n}, what is the {c} of each {row}?",
    ),
    "top_n": (
        "Print the {c} for the {k} {rows} having the {high} {n}.",
        "Sort the {rows} by {n}, {high} first, and give the {c} of the first {k}.",
        "I am looking for the top {k} {rows} by {n}, {high} first; show me the {c}.",
    ),
    "bottom_n": (
        "Print the {c} for the {k} {rows} having the {low} {n}.",
        "Sort the {rows} by {n}, {low} first, and give the {c} of the first {k}.",
        "I am looking for the bottom {k} {rows} by {n}, {low} first; show me the {c}.",
    ),
    "highest_row": (
        "Print the {c} of the one {row} whose {n} is the {high}.",
        "I am looking for the {row} with the {high} {n}; show me its {c}.",
        "The {high} {n} belongs to which {row}? Give its {c}.",
    ),
    "lowest_row": (
        "Print the {c} of the one {row} whose {n} is the {low}.",
        "I am looking for the {row} with the {low} {n}; show me its {c}.",
        "The {low} {n} belongs to which {row}? Give its {c}.",
    ),
    "count_rows": (
        "In total, how many {rows} are there in the database?",
        "Please count all the {rows} we have.",
        "I want to know the number of {rows}.",
    ),
    "count_equals": (
        "I want to know how many {rows} have {v} as {f}.",
        "Please count all the {rows} with {f} equal to {v}.",
        "Where the {f} is {v}, how many {rows} are there?",
    ),
    "count_greater": (
        "I want to know how many {rows} have more than {v} as {n}.",
        "Please count all the {rows} with {a_n} higher than {v}.",
        "Where the {n} is above {v}, how many {rows} are there?",
    ),
    "count_distinct": (
        "I want to know how many distinct {cs} the {rows} have.",
        "Please count the unique values of {c} among all {rows}.",
        "Among the {rows}, what is the number of unique {cs}?",
    ),
    "total": (
        "I want to know the sum of the {n} of all {rows}.",
        "Please add up the {n} over every {row}.",
        "Across all {rows}, what is the total {n}?",
    ),
    "average": (
        "I want to know the average {n} of all {rows}.",
        "Please compute the mean of the {n} over all {rows}.",
        "Across all {rows}, what is the average {n}?",
    ),
    "largest": (
        "I want to know the maximum {n} over all {rows}.",
        "Among the {rows}, how high is the {high} {n}?",
        "Please tell me the maximum value of the {n} of any {row}.",
    ),
    "smallest": (
        "I want to know the minimum {n} over all {rows}.",
        "Among the {rows}, how low is the {low} {n}?",
        "Please tell me the minimum value of the {n} of any {row}.",
    ),
    "average_where": (
        "I want to know the average {n} of all {rows} with {v} as {f}.",
        "Where the {f} is {v}, what is the mean {n} of the {rows}?",
        "Please compute the average {n} for every {row} with {f} {v}.",
    ),
    "group_count": (
        "For every {f}, show the {f} and the number of {rows}.",
        "I want to see each {f} along with a count of its {rows}.",
        "List how many {rows} there are per {f}, with the {f} first.",
    ),
    "group_average": (
        "For every {f}, show the {f} and the average {n} of the {rows}.",
        "I want to see each {f} along with the mean {n} of its {rows}.",
        "List the average {n} of the {rows} per {f}, with the {f} first.",
    ),
    "group_having": (
        "Print each {f} that has more than {k} {rows}.",
        "I am looking for {fs} with more than {k} {rows}.",
        "Over {k} {rows} share the same {f}: which {fs} are these?",
    ),
    "most_common": (
        "I want to know the {f} that is most common among the {rows}.",
        "Most {rows} have which {f}?",
        "Print the most frequent {f} among all {rows}.",
    ),
    "in_year": (
        "Print the {c} for every {row} whose {n} falls in the year {v}.",
        "Tell me the {c} of all {rows} with {a_n} during {v}.",
        "Where the {n} is in the year {v}, what {c} do the {rows} have?",
    ),
    "after_date": (
        "Print the {c} for every {row} whose {n} is later than {v}.",
        "Of all {rows}, which have {a_n} later than {v}? Return their {c}.",
        "Where the {n} is after {v}, what {c} do the {rows} have?",
    ),
    "before_date": (
        "Print the {c} for every {row} whose {n} is earlier than {v}.",
        "Tell me the {c} of all {rows} with {a_n} before {v}.",
        "Where the {n} is before {v}, what {c} do the {rows} have?",
    ),
    "join_columns": (
        "Print every {child}'s {c} and the {d} of the {parent} it belongs to.",
        "I want to see the {c} of each {child} with the {d} of its {parent}.",
        "For all {children}, what are the {c} and the {d} of the {parent}?",
    ),
    "join_filter": (
        "Print the {c} for every {child} of {a_parent} whose {f} is {v}.",
        "Tell me the {c} of all {children} that belong to {parents} with {f} {v}.",
        "Where the {parent} has the {f} {v}, what {c} do the {children} have?",
    ),
    "join_count_where": (
        "I want to know how many {children} belong to {a_parent} with {f} {v}.",
        "Please count all the {children} of the {parents} whose {f} is {v}.",
        "Where the {parent} has the {f} {v}, how many {children} are there?",
    ),
    "join_count": (
        "Print the {c} of each {parent} that has {children}, followed by its count of {children}.",
        "I want to see each {parent} with {children}: its {c} and how many {children} it has.",
        "For all {parents} with at least one {child}, what are the {c} and the number of {children}?",
    ),
    "join_total": (
        "Print the {c} of each {parent} that has {children}, followed by the total {n} of the {children}.",
        "I want to see each {parent} with {children}: its {c} and the total {n} of the {children}.",
        "For all {parents} with at least one {child}, what are the {c} and the total {n} of the {children}?",
    ),
    "join_top": (
        "Print the {c} of the one {parent} with the largest number of {children}.",
        "I am looking for the {parent} with the most {children}; show me its {c}.",
        "The most {children} belong to which {parent}? Give its {c}.",
    ),
    "join_having": (
        "Print the {c} for every {parent} with more than {k} {children}.",
        "I am looking for {parents} that have over {k} {children}; show me the {c}.",
        "Tell me the {c} of all {parents} whose number of {children} is over {k}.",
    ),
    "two_hop": (
        "Print the {c} for every {child} whose {parent} belongs to {a_top} whose {f} is {v}.",
        "I am looking for {children} of {parents} of {tops} with {f} {v}; show me the {c}.",
        "Where the {top} of the {parent} has the {f} {v}, what {c} do the {children} have?",
    ),
    "above_average": (
        "Print the {c} for every {row} whose {n} exceeds the mean.",
        "I am looking for {rows} with {a_n} above average; show me the {c}.",
        "Of all {rows}, which have {a_n} higher than the average? Return their {c}.",
    ),
    "at_maximum": (
        "Print the {c} for all {rows} that share the maximum {n}.",
        "I am looking for every {row} whose {n} equals the maximum; show me the {c} of all of them.",
        "Where the {n} is equal to the maximum {n}, what {c} do the {rows} have?",
    ),
    "with_child": (
        "Print the {c} for every {parent} that has at least one {child} with {f} {v}.",
        "I am looking for {parents} with {a_child} whose {f} is {v}; show me the {c}.",
        "Of all {parents}, which have at least one {child} with {f} {v}? Return their {c}.",
    ),
    "without_children": (
        "Print the {c} for every {parent} with no {children}.",
        "I am looking for {parents} that have no {children} at all; show me the {c}.",
        "Of all {parents}, which never had any {children}? Return their {c}.",
    ),
}
