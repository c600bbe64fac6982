"""The report's style sheet: light and dark by the reader's setting, narrow screens, print."""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1d2327; --soft: #5b6770; --line: #dfe4e8; --panel: #f5f7f9;
  --first: #1f6feb; --second: #c2570c; --faint: #a9c4f5; --good: #1a7f37; --bad: #c62828; --warn: #fff6df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181c; --ink: #e4e8eb; --soft: #9aa6af; --line: #313940; --panel: #1d2329;
    --first: #6cb0ff; --second: #f0954e; --faint: #35557f; --good: #57c174; --bad: #ff7b72; --warn: #36301c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
h1 { margin: 0; font-size: 1.8rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.2rem; }
p { margin: .5rem 0; }
.sub { color: var(--soft); overflow-wrap: anywhere; }
.summary { margin-top: 1.25rem; padding: .9rem 1.1rem; border-left: 4px solid var(--first);
  background: var(--panel); }
.warning { padding: .7rem 1.1rem; border-left: 4px solid var(--second); background: var(--warn); }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
td.n, th.n { text-align: right; white-space: nowrap; }
td small { display: block; color: var(--soft); white-space: nowrap; }
tr.tight th, tr.tight td { padding-top: .25rem; padding-bottom: .25rem; font-size: .93rem; }
tr.group th { padding-top: 1.1rem; color: var(--soft); font-size: .85rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .muted { color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: .3rem 1.25rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.range { min-width: 9rem; width: 30%; }
.range svg { display: block; width: 100%; height: 2.6rem; overflow: visible; }
.range .track { stroke: var(--line); } .range .base { stroke: var(--second); }
.range .tuned { stroke: var(--first); }
.range path { fill: none; stroke-width: 1; vector-effect: non-scaling-stroke; }
.range .whisker { stroke-width: 3; opacity: .45; } .range .mark { stroke-width: 4; }
.key i, .legend i { display: inline-block; width: 1.3em; height: 0; margin-right: .45em;
  vertical-align: .25em; border-top: 3px solid var(--first); }
.key i.second, .legend i.second { border-color: var(--second); }
.legend i.faint { border-color: var(--faint); }
.key { margin: .6rem 0 0; color: var(--soft); font-size: .85rem; } .key span { margin-right: 1.2rem; }
.charts { display: grid; grid-template-columns: 1fr; gap: 1.5rem; }
figure { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; margin: 0 0 .7rem 3.6rem; padding: 0;
  list-style: none; font-size: .85rem; }
.axis, figcaption { color: var(--soft); font-size: .85rem; }
.x-name { margin-left: 3.6rem; text-align: center; } figcaption { margin-left: 3.6rem; }
.frame { position: relative; height: 19rem; padding: 0 .8rem 1.7rem 3.6rem; }
.small .frame { height: 9rem; }
.frame svg { display: block; width: 100%; height: 100%; overflow: visible; }
.frame path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.frame .grid { stroke: var(--line); stroke-width: 1; }
.frame .line { stroke: var(--first); stroke-width: 2; }
.frame .line.second { stroke: var(--second); stroke-width: 2.5; }
.frame .line.faint { stroke: var(--faint); stroke-width: 1; }
.y { position: absolute; left: 0; top: 0; width: 3.1rem; height: calc(100% - 1.7rem); }
.x { position: absolute; left: 3.6rem; right: .8rem; bottom: 0; height: 1.4rem; }
.y span { position: absolute; right: 0; transform: translateY(-50%); }
.x span { position: absolute; transform: translateX(-50%); }
.y, .x { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; }
.example { margin: 0 0 1.1rem; padding: .9rem 1.1rem 1rem; border: 1px solid var(--line);
  border-radius: 8px; }
.example p { margin: .6rem 0 0; font-size: .9rem; }
.example h3 { margin: 0 0 .6rem; font-size: 1rem; }
.example .row { display: grid; grid-template-columns: 9.5rem 1fr; gap: .2rem .9rem; margin-top: .35rem; }
.example .row > span { padding-top: .2rem; font-size: .9rem; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.example code { padding: .25rem .55rem; border-radius: 5px; background: var(--panel); white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre { margin: .3rem 0 1rem; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px;
  background: var(--panel); }
details summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 38rem) {
  body { padding-top: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  .example .row { grid-template-columns: 1fr; }
  .frame { height: 14rem; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --ink: #000; --soft: #444; --line: #ccc; --panel: #f6f6f6;
    --first: #1f6feb; --second: #c2570c; --faint: #a9c4f5; --good: #1a7f37; --bad: #c62828; --warn: #fff6df;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; } figure, .example, tr { break-inside: avoid; }
  .frame { height: 7.5cm; } .small .frame { height: 3.5cm; }
  pre { white-space: pre-wrap; } .scroll { overflow: visible; }
}
"""
