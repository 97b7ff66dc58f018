"""The look of a report: one style sheet and one short script, both inlined into the page."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --muted: #68655e; --line: #e5e1d8; --wash: #f2efe8;
  --accent: #4f46c8; --slate: #5b6577; --pale: #9aa1ad; --good: #14803c; --bad: #c2322d; --amber: #b45309;
  --box: #f59e0b; --hide: #545e70;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --card: #1f1f1d; --ink: #ecebe6; --muted: #a29e95; --line: #34332f; --wash: #282724;
    --accent: #a5a0ff; --slate: #a3acbb; --pale: #727a87; --good: #5bc983; --bad: #ff8079; --amber: #f0a64a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans);
  -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
main, footer { max-width: 1080px; margin: 0 auto; padding: 0 28px; }
section { margin-top: 88px; scroll-margin-top: 24px; }
h1, h2 { font-family: var(--serif); font-weight: 600; letter-spacing: -.012em; line-height: 1.15; text-wrap:
  balance; }
h1 { font-size: clamp(32px, 5.4vw, 52px); margin: 0; }
h2 { font-size: clamp(24px, 3.2vw, 32px); margin: 0 0 8px; }
h3 { font-size: 16px; font-weight: 600; margin: 40px 0 14px; }
p { margin: 0 0 12px; max-width: 68ch; text-wrap: pretty; }
.intro { color: var(--muted); margin-bottom: 28px; }
header { padding: 64px 0 0; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 14px; margin: 0 0 14px; }
.lede { font-family: var(--serif); font-size: clamp(18px, 2.3vw, 22px); line-height: 1.5; margin: 20px 0 0;
  max-width: 44em; }
.about { color: var(--muted); margin: 14px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 6px 22px; margin-top: 26px; font-size: 15px; }
nav a { color: var(--accent); text-decoration: none; border-bottom: 1px solid transparent; }
nav a:hover { border-color: currentColor; }
code, pre { font-family: var(--mono); font-size: .9em; }

/* headline cards */
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 20px; margin-top:
  44px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px 26px
  22px; }
.card h3 { margin: 0 0 2px; font-size: 15px; color: var(--muted); font-weight: 500; }
.card .big { font-family: var(--serif); font-size: 50px; line-height: 1.15; letter-spacing: -.02em; margin:
  0; }
.big small { font-size: .5em; color: var(--muted); letter-spacing: 0; }
.card p { font-size: 15px; margin: 0 0 14px; }
.card p.what { color: var(--muted); margin: 14px 0 0; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 7px 12px; align-items:
  center;
  font-size: 14px; margin: 14px 0; font-variant-numeric: tabular-nums; }
.bars .track { background: var(--wash); border-radius: 3px; height: 10px; position: relative; }
.bars .fill { display: block; height: 100%; border-radius: 3px; min-width: 2px; }
.bars .sync { background: var(--accent); }
.bars .shuffled { background: var(--slate); }
.bars .random { background: var(--pale); }
.bars.four { grid-template-columns: max-content 1fr max-content max-content; }
.bars b { font-weight: 600; }
.bars .value, .bars .beside { text-align: right; }
.bars .beside { color: var(--muted); }
.lift b { font-weight: 600; } .verdict { font-weight: 500; }
.verdict.yes { color: var(--good); } .verdict.no { color: var(--amber); }
.key { display: flex; flex-wrap: wrap; gap: 8px 26px; font-size: 15px; margin: 0 0 22px; align-items:
  center; }
.key .swatch { display: inline-block; width: 15px; height: 15px; border-radius: 3px; vertical-align: -2px;
  margin-right: 8px; }
.swatch.boxed { border: 2.5px solid var(--box); } .swatch.dashed { border: 1.5px dashed var(--box); }
.swatch.slate { background: var(--hide); }
.swatch.violet { background: #4f46c8; }
.reading { border-left: 3px solid var(--accent); padding: 2px 0 2px 24px; margin-top: 52px; }
.reading h2 { font-size: 22px; } .reading p:last-child { margin: 0; }

/* masks */
.heat-switch { position: absolute; opacity: 0; }
.heat-switch + label { display: inline-flex; gap: 10px; align-items: center; cursor: pointer; font-size:
  15px; margin-bottom: 26px; }
.heat-switch + label::before { content: ""; width: 34px; height: 20px; border-radius: 10px; background:
  radial-gradient(circle at 10px 10px, #fff 6.5px, transparent 7.2px) no-repeat, var(--pale); transition:
    background-position .15s; }
.heat-switch:checked + label::before { background-position: 14px 0, 0 0; background-color: var(--accent); }
.heat-switch:focus-visible + label { outline: 2px solid var(--accent); outline-offset: 4px; border-radius:
  4px; }
.example { border-top: 1px solid var(--line); padding: 26px 0 40px; }
.example > h3 { margin: 0 0 16px; } .example > h3 span { color: var(--muted); font-weight: 400; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 34px; }
.three figure { margin: 0; min-width: 0; }
.three h4 { margin: 0; font-size: 15px; font-weight: 600; }
.three .sync h4 { color: var(--accent); }
.three .count { font-size: 14px; color: var(--muted); margin: 0 0 10px; line-height: 1.4; min-height: 2.8em;
  }
.pic { display: block; width: 100%; height: auto; border-radius: 10px; outline: none; background:
  var(--wash); }
.pic .mask, .pic .heat { transition: opacity .18s; }
.pic:hover .mask, .pic:focus .mask { opacity: .12; }
.pic:focus-visible { box-shadow: 0 0 0 3px var(--accent); }
.mask.random { fill: var(--hide); } .mask.sync { fill: #4f46c8; } .mask { fill-opacity: .78; }
.halo { fill: none; stroke: #fff; stroke-width: 4; vector-effect: non-scaling-stroke; stroke-opacity: .8; }
.box { fill: none; stroke: var(--box); stroke-width: 2; vector-effect: non-scaling-stroke; }
.large { fill: none; stroke: var(--box); stroke-width: 1.5; stroke-dasharray: 5 4;
  vector-effect: non-scaling-stroke; }
.badge circle { fill: var(--box); stroke: #fff; stroke-width: 1.4; vector-effect: non-scaling-stroke; }
.badge text { font: 700 1px var(--sans); text-anchor: middle; fill: #1d1c1a; }
.heat { opacity: 0; image-rendering: pixelated; }
.heat-switch:checked ~ * .sync .heat { opacity: 1; }
.heat-switch:checked ~ * .sync .mask { opacity: 0; }
.said { margin: 14px 0 0; font-size: 15.5px; line-height: 1.75; }
.tally { font-size: 14px; color: var(--muted); margin: 8px 0 0; }
.names { list-style: none; margin: 14px 0 0; padding: 0; font-size: 15px; line-height: 1.75; }
.names li { display: grid; grid-template-columns: 30px minmax(0, 1fr); align-items: baseline; }
.names .swatch { width: 16px; height: 16px; margin-left: 2px; border-radius: 3px; align-self: center; }
.names b { width: 20px; height: 20px; line-height: 20px; border-radius: 50%; text-align: center; font-size:
  12px;
  background: var(--box); color: #1d1c1a; }
.w.hidden { text-decoration: line-through 1.5px; border-radius: 4px; padding: 1px 3px; margin: 0 -1px; }
.random .w.hidden, .key .w.hidden { background: color-mix(in srgb, var(--slate) 20%, transparent); color:
  var(--slate); }
.sync .w.hidden { background: color-mix(in srgb, var(--accent) 18%, transparent); color: var(--accent); }
.w.unseen { border-bottom: 2.5px dotted var(--amber); }
.w.unseen.hidden { border-bottom-left-radius: 0; border-bottom-right-radius: 0; }
.heat-switch:checked ~ * .sync .w { text-decoration: none; color: inherit;
  background: color-mix(in srgb, var(--accent) calc(var(--h, 0) * 55%), transparent); }
.fold > summary { cursor: pointer; color: var(--accent); font-weight: 500; padding: 14px 0; }
.fold > summary:focus-visible { outline: 2px solid var(--accent); }

/* retrieval */
.query { border-top: 1px solid var(--line); padding: 22px 0 28px; display: grid; grid-template-columns:
  250px minmax(0, 1fr); gap: 14px 36px; }
.query .ask { font-family: var(--serif); font-size: 17px; line-height: 1.45; margin: 0; }
.query .rank { font-size: 14px; margin: 10px 0 0; color: var(--muted); } .rank.first { color: var(--good); }
.query > div > img { width: 168px; max-width: 100%; border-radius: 10px; display: block; }
.hits { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px; grid-template-columns:
  repeat(auto-fill, minmax(116px, 1fr)); }
.hits li { min-width: 0; }
.hits img { display: block; width: 100%; border-radius: 10px; border: 3px solid var(--paper);
  box-shadow: 0 0 0 2.5px var(--bad); }
.hits li.right img { box-shadow: 0 0 0 2.5px var(--good); }
.hits p, .lines p { margin: 9px 0 0; font-size: 14px; color: var(--muted); font-variant-numeric:
  tabular-nums; }
.mark { font-weight: 700; color: var(--bad); } .right .mark { color: var(--good); }
.lines { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px; }
.lines li { display: grid; grid-template-columns: 22px minmax(0, 1fr) max-content; gap: 12px; padding: 10px
  14px; border-radius: 9px;
  box-shadow: inset 0 0 0 1.5px color-mix(in srgb, var(--bad) 55%, transparent); font-size: 15px;
    line-height: 1.5; }
.lines li.right { box-shadow: inset 0 0 0 2.5px var(--good); }
.lines p { margin: 0; }

/* charts */
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 40px 34px;
  margin-top: 28px; }
.chart { margin: 0; min-width: 0; }
.chart.several .now { grid-column: 1 / -1; text-align: left; font-size: 14px; }
.chart.several .note { min-height: 0; }
.chart figcaption { display: grid; grid-template-columns: 1fr max-content; gap: 0 14px; font-size: 15px;
  align-items: baseline; }
.chart .now { font-variant-numeric: tabular-nums; text-align: right; }
.chart .now i { font-style: normal; }
.chart .now i.main { color: var(--accent); }
.chart .now i.shuffled { color: var(--slate); }
.chart .now i.random { color: var(--muted); }
.chart .note { grid-column: 1 / -1; color: var(--muted); font-size: 14px; line-height: 1.45; min-height:
  2.9em; }
.chart svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.grid { stroke: var(--line); } .tick { fill: var(--muted); font: 10.5px var(--sans); }
.line, .raw { fill: none; stroke: var(--accent); stroke-linejoin: round; stroke-linecap: round; }
.line { stroke-width: 1.9; } .raw { stroke-width: 1; opacity: .24; } .dot { fill: var(--accent); }
.line.shuffled { stroke: var(--slate); } .dot.shuffled { fill: var(--slate); }
.line.random { stroke: var(--pale); stroke-dasharray: 4 4; } .dot.random { fill: var(--pale); }
.hair { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 3; }

/* tables */
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 14px 10px 0; text-align: right; border-bottom: 1px solid var(--line); white-space:
  nowrap; }
th { font-weight: 500; color: var(--muted); }
th:first-child, td:first-child { text-align: left; white-space: normal; }
td small { color: var(--muted); font-size: .88em; } .above { color: var(--good); font-weight: 600; }
table.flat td:last-child { text-align: left; width: 55%; white-space: normal; overflow-wrap: anywhere; }
table.flat td:first-child { overflow-wrap: anywhere; }
table.flat td { padding: 6px 14px 6px 0; font-family: var(--mono); font-size: 13.5px; }
dl.terms { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 8px 26px; font-size: 15px;
  margin: 22px 0 0; }
dl.terms dt { font-weight: 600; } dl.terms dd { margin: 0; color: var(--muted); max-width: 68ch; }
dl.facts dd { color: var(--ink); overflow-wrap: anywhere; }
.command { display: flex; gap: 14px; align-items: start; background: var(--wash); border-radius: 10px;
  padding: 14px 18px; margin: 18px 0 0; }
.command pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; flex: 1; }
button { font: 500 14px var(--sans); color: var(--accent); background: none; border: 0; cursor: pointer;
  padding: 2px 4px; }
footer { color: var(--muted); font-size: 14px; margin-top: 88px; padding-bottom: 64px; }

@media (max-width: 700px) {
  main, footer { padding: 0 18px; } section { margin-top: 64px; } header { padding-top: 40px; }
  .three { grid-template-columns: 1fr; gap: 20px; }
  .three figure { display: grid; grid-template-columns: 42% minmax(0, 1fr); gap: 2px 16px;
    grid-template-rows: auto auto 1fr; }
  .three .pic { grid-column: 1; grid-row: 1 / 5; } .three .count { min-height: 0; margin: 0; }
  .three .said, .three .names { margin-top: 4px; font-size: 14.5px; line-height: 1.65; }
  .query { grid-template-columns: 1fr; } .query > div > img { width: 140px; }
  .hits { grid-template-columns: repeat(3, 1fr); } .lines li { padding: 10px 12px; gap: 8px; }
  .charts { grid-template-columns: 1fr; } .chart .note { min-height: 0; }
  dl.terms { grid-template-columns: 1fr; gap: 2px; } dl.terms dd { margin-bottom: 10px; }
  th, td { padding-right: 12px; }
}
@media print { nav, .heat-switch + label, button { display: none; } section { break-inside: auto; }
  .example, .chart { break-inside: avoid; } }
"""

SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const lines = JSON.parse(chart.dataset.lines), svg = chart.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), hair = cursor.querySelector(".hair");
  const now = chart.querySelector(".now");
  const rest = [...now.childNodes];
  const dots = lines.map((line) => {
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    dot.setAttribute("class", "dot " + line.style);
    dot.setAttribute("r", "3.2");
    cursor.append(dot);
    return dot;
  });
  const leave = () => { cursor.setAttribute("visibility", "hidden"); now.replaceChildren(...rest); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
    const said = [];
    lines.forEach((line, index) => {
      let best = 0;
      line.x.forEach((value, at) => { if (Math.abs(value - x) < Math.abs(line.x[best] - x)) best = at; });
      dots[index].setAttribute("cx", line.x[best]);
      dots[index].setAttribute("cy", line.y[best]);
      if (!index) {
        hair.setAttribute("x1", line.x[best]);
        hair.setAttribute("x2", line.x[best]);
        said.push("step " + line.s[best].toLocaleString("en"));
      }
      said.push((lines.length > 1 ? line.label + " " : "") + line.v[best]);
    });
    cursor.setAttribute("visibility", "visible");
    now.textContent = said.join(" · ");
  });
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(button.dataset.copy); button.textContent = "Copied"; }
    catch {
      button.textContent = "Press Ctrl+C";
      getSelection().selectAllChildren(button.previousElementSibling);
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
"""
