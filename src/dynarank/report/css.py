"""The style sheet of the page: light and dark, from a phone to a desk, and on paper."""

# The series colours differ in lightness as well as in hue, so that they stay apart in simulated protanopia,
# deuteranopia and tritanopia; each has a contrast of three to one or more against the cards.
STYLE = """
:root {
  color-scheme: light dark;
  --back: #fbfbf9; --card: #ffffff; --ink: #1c2126; --muted: #5a636e; --rule: #c9ced4; --line: #e5e7ea;
  --accent: #0b62ac; --warn-back: #fff4dc; --warn: #7a5200;
  --c0: #1565d8; --c1: #e8590c; --c2: #2f9e8f; --c3: #8e1a80; --c4: #5c5200; --c5: #1d1a52;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1b1f25; --ink: #e7eaee; --muted: #a3acb7; --rule: #48505a; --line: #2c323a;
    --accent: #6cbcf0; --warn-back: #35290f; --warn: #f0cd83;
    --c0: #a9cdf8; --c1: #f28a1c; --c2: #0e8f78; --c3: #e65db8; --c4: #f5ee8a; --c5: #6f7bf7;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 2.2rem 1.2rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.6rem 0 .4rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
.sub, .caption { color: var(--muted); }
.caption { font-size: .95rem; }
.warn {
  background: var(--warn-back); color: var(--warn); border-radius: 8px; padding: .7rem 1rem; margin: 1.1rem 0;
  max-width: none;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: .8rem 1rem .7rem; }
.tile dt { color: var(--muted); font-size: .85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.5rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .long { font-size: 1.15rem; line-height: 1.7; }
.tile .note { color: var(--muted); font-size: .82rem; }
.grid { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 235px), 1fr)); }
.card { margin: 0; padding: .9rem 1rem .8rem; min-width: 0; }
.grid > div.card { align-self: start; }
.small .card { display: flex; flex-direction: column; justify-content: space-between; }
.small .card h3 { font-size: .85rem; }
.card svg { display: block; width: 100%; height: auto; overflow: visible; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
.card svg text { font-family: inherit !important; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .5rem 0 0; padding: 0; }
.legend li { font-size: .87rem; }
.legend .keyed { white-space: normal; overflow-wrap: anywhere; }
.keyed { white-space: nowrap; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: .1rem; }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; white-space: nowrap; }
tbody th { font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
details { margin: .9rem 0; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
details > .grid, details > .scroll { margin-top: .7rem; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: .87rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: .5rem 0;
}
footer { color: var(--muted); font-size: .85rem; margin-top: 3rem; }
@media (max-width: 560px) {
  main { padding: 1.4rem .9rem 2rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .tile { padding: .65rem .8rem; }
  .tile .value { font-size: 1.25rem; }
  .tile .long { font-size: 1rem; }
  .card { padding: .7rem .6rem; }
  .grid:not(.small) > .card svg text { font-size: 13px !important; }
  table { font-size: .87rem; }
  th, td { padding: .35rem .5rem; }
  thead th { white-space: normal; vertical-align: bottom; }
}
@media print { .card, .tile { break-inside: avoid; } }
"""
