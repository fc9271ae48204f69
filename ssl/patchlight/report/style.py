"""The style sheet of the report, and the script that writes values beside the pointer."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #69727d; --edge: #e3e6ea; --grid: #eceef1;
  --c0: #2f6fde; --c1: #e0862c; --c2: #23967f; --c3: #a457b8; --alarm: #b3372b; --alarm-page: #fdf1ef; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111417; --card: #1a1e23; --ink: #e8ebee; --soft: #98a2ad; --edge: #2b3138; --grid: #262b31;
  --c0: #6ea3ff; --c1: #f0a458; --c2: #4fc3ab; --c3: #c98bd9; --alarm: #f0877b; --alarm-page: #2a1b1a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -0.02em; }
header p { margin: 4px 0; color: var(--soft); }
.bar { height: 6px; margin: 16px 0 8px; border-radius: 3px; background: var(--edge); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--c0); }
.state { font-size: 13px; font-variant-numeric: tabular-nums; }
h2 { margin: 40px 0 14px; font-size: 18px; letter-spacing: -0.01em; }
h3 { display: flex; justify-content: space-between; gap: 12px; margin: 0 0 6px; font-size: 13px; font-weight: 500;
  color: var(--soft); }
h3 b { color: var(--ink); font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 12px; margin-top: 22px; }
.tile, .card, figure, table { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 12px 14px; display: flex; flex-direction: column; }
.tile span, .tile em { color: var(--soft); font-size: 12.5px; font-style: normal; }
.tile b { font-size: 23px; line-height: 1.35; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
.card { position: relative; padding: 14px 16px 8px; }
.chart { display: block; width: 100%; overflow: visible; }
.grid { stroke: var(--grid); } .level { stroke: var(--soft); stroke-dasharray: 4 4; }
.tick { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); }
.band { stroke: none; fill-opacity: 0.16; } .band.c0 { fill: var(--c0); } .band.c1 { fill: var(--c1); }
.band.c2 { fill: var(--c2); } .band.c3 { fill: var(--c3); }
.dot.c0, i.c0 { fill: var(--c0); background: var(--c0); } .dot.c1, i.c1 { fill: var(--c1); background: var(--c1); }
.dot.c2, i.c2 { fill: var(--c2); background: var(--c2); } .dot.c3, i.c3 { fill: var(--c3); background: var(--c3); }
.cursor { stroke: var(--soft); visibility: hidden; }
.tip { position: absolute; z-index: 1; padding: 5px 9px; border-radius: 6px; background: var(--ink); color: var(--card);
  font-size: 12px; line-height: 1.4; white-space: nowrap; pointer-events: none; visibility: hidden;
  font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 12.5px; }
.key i { display: inline-block; width: 9px; height: 9px; margin-right: 6px; border-radius: 50%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 14px; margin-top: 14px; }
figure { margin: 0; padding: 12px; overflow-x: auto; } figure img { display: block; max-width: 100%; border-radius: 4px; }
figcaption, .nothing { margin-top: 8px; color: var(--soft); font-size: 12.5px; }
table { width: 100%; margin-bottom: 14px; border-spacing: 0; font-size: 13px; overflow: hidden; }
th { width: 32%; text-align: left; font-weight: 500; color: var(--soft); vertical-align: top; }
th, td { padding: 6px 14px; border-top: 1px solid var(--grid); overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
.numbers th { width: auto; } .numbers th + th, .numbers td + td { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
summary { margin-bottom: 10px; cursor: pointer; color: var(--soft); font-size: 13px; }
.alarm { margin-top: 22px; padding: 2px 18px; border: 1px solid var(--alarm); border-radius: 10px;
  background: var(--alarm-page); }
.alarm h2 { margin-top: 12px; color: var(--alarm); }
"""

SCRIPT = """
for (const chart of document.querySelectorAll("svg.chart")) {
  const lines = JSON.parse(chart.dataset.hover), cursor = chart.querySelector(".cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  chart.parentElement.append(tip);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect(), scale = chart.viewBox.baseVal.width / box.width;
    const at = (event.clientX - box.left) * scale;
    const nearest = lines.map((line) => line.x.reduce((best, x, i) =>
      Math.abs(x - at) < Math.abs(line.x[best] - at) ? i : best, 0));
    const x = lines[0].x[nearest[0]];
    tip.replaceChildren(...[`step ${lines[0].steps[nearest[0]].toLocaleString("en")}`]
      .concat(lines.map((line, i) => (lines.length > 1 ? line.name + ": " : "") + line.text[nearest[i]]))
      .map((text) => Object.assign(document.createElement("div"), { textContent: text })));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = tip.style.visibility = "visible";
    const left = x / scale + box.left - chart.parentElement.getBoundingClientRect().left, width = tip.offsetWidth;
    tip.style.left = (left + 12 + width > chart.parentElement.clientWidth ? left - width - 12 : left + 12) + "px";
    tip.style.top = chart.parentElement.querySelector("h3").offsetHeight + 18 + "px";
  });
  chart.addEventListener("pointerleave", () => { cursor.style.visibility = tip.style.visibility = "hidden"; });
}
"""
