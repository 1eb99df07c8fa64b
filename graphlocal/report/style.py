"""The report's style sheet: the partition page's colours, in light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f4f6f9; --surface: #ffffff; --line: #d3dae3; --grid: #e6eaf0; --text: #18212c; --muted: #566272;
  --s0: #1558b0; --s1: #c04c00; --s2: #00785a; --s3: #8a3ea8;
  --c0: #332288; --c1: #e08214; --c2: #44aa99; --c3: #117733; --c4: #999933;
  --c5: #cc6677; --c6: #56a8dc; --c7: #882255; --c8: #aa4499; --c9: #777777;
}
@media (prefers-color-scheme: dark) { :root {
  --ground: #10151b; --surface: #181f27; --line: #2f3a47; --grid: #27313c; --text: #e8edf3; --muted: #a2aebd;
  --s0: #86b9ff; --s1: #ff9d57; --s2: #4fc9a4; --s3: #cf9bea;
  --c0: #9486f5; --c1: #ffb35c; --c2: #5fd3c0; --c3: #4fb06c; --c4: #cdcd60;
  --c5: #f28b9b; --c6: #88ccee; --c7: #d0568f; --c8: #d986cb; --c9: #b0b0b0;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 14px 0 6px; font-weight: 600; color: var(--muted); }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 18px 0; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 26px; margin: 0 0 6px; }
.facts dt { font-size: 12px; color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.about, .small { color: var(--muted); font-size: 13px; margin: 0 0 12px; max-width: 78ch; }
.small { font-size: 12px; margin: 6px 0 0; }
.note { border-left: 3px solid var(--s1); padding: 4px 12px; margin: 10px 0; overflow-wrap: anywhere; }
.key { display: flex; gap: 20px; margin: 6px 0; font-size: 13px; }
.swatch { width: 26px; height: 8px; margin-right: 6px; vertical-align: middle; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.multiples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 232px), 1fr)); gap: 10px 14px; }
figure { margin: 0; min-width: 0; max-width: 330px; }
figcaption { font-size: 13px; font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: var(--s0); }
.dot { fill: var(--s0); }
.s1 { stroke: var(--s1); stroke-dasharray: 6 4; } .dot.s1 { fill: var(--s1); stroke: none; }
.s2 { stroke: var(--s2); stroke-dasharray: 2 3; } .dot.s2 { fill: var(--s2); stroke: none; }
.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3; } .dot.s3 { fill: var(--s3); stroke: none; }
.faint { opacity: .35; stroke-width: 1; }
.grid { stroke: var(--grid); } .axis { stroke: var(--muted); }
.level { stroke: var(--muted); stroke-dasharray: 4 4; }
.tick { font-size: 11px; fill: var(--muted); } .name { font-size: 12px; fill: var(--text); }
.point { opacity: .85; }
.cluster { font-size: 13px; font-weight: 700; fill: var(--text); stroke: var(--surface); stroke-width: 3.5px;
  paint-order: stroke; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.c8 { fill: var(--c8); } .c9 { fill: var(--c9); }
table { border-collapse: collapse; font-size: 13px; margin-top: 10px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--muted); }
.meta th, .meta td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
iframe { width: 100%; height: 640px; border: 1px solid var(--line); border-radius: 8px; display: block; }
.drawn { overflow: auto; } pre { overflow: auto; font-size: 12px; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
