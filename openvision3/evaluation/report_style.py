"""The style sheet of the report: light and dark, wide and narrow, no fonts or pictures from elsewhere."""

STYLE = """
:root {
  --paper: #f7f7f5; --card: #ffffff; --ink: #1b1d21; --muted: #6b7078; --line: #e3e4e1;
  --accent: #2b62c8; --soft: #e9effa; --good: #1d7a4b; --bad: #b3402e; --shadow: 0 1px 2px rgb(20 22 26 / 6%);
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f24; --ink: #e8e9ec; --muted: #9aa0aa; --line: #30343b;
    --accent: #83adff; --soft: #24304a; --good: #6ccf9b; --bad: #f0907c; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 6px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 52px 0 4px; }
h3 { font-size: 15px; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { color: var(--muted); font-size: 17px; }
.note { color: var(--muted); font-size: 14px; margin-bottom: 16px; }
.facts {
  display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 14px 0 0; padding: 0; list-style: none;
  font-size: 14px;
}
.facts b { font-weight: 600; } .facts li { color: var(--muted); } .facts b { color: var(--ink); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; box-shadow: var(--shadow); }
.tiles, .charts, .tables { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); margin-top: 28px; }
.tile { padding: 16px 18px 14px; }
.tile .what { font-size: 14px; color: var(--muted); }
.tile .value {
  font-size: 32px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.tile .value small { font-size: 16px; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.tile .beside { font-size: 13px; color: var(--muted); margin-top: 8px; }
.bar { position: relative; height: 8px; border-radius: 4px; background: var(--soft); margin-top: 8px; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.bar s { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); }
.bar s.chance { background: var(--muted); }
.charts { grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); }
.chart { padding: 14px 16px 8px; margin: 0; }
.chart figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; }
.chart figcaption span { color: var(--muted); font-variant-numeric: tabular-nums; white-space: nowrap; }
.chart svg { display: block; width: 100%; height: auto; margin-top: 4px; }
.chart svg text { font-family: inherit !important; fill: var(--muted); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 14px; }
.picture { padding: 14px; margin: 0; }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
.strip figure { margin: 0; }
.strip img { display: block; width: 100%; aspect-ratio: 1; border-radius: 5px; background: var(--soft); }
.strip img.tokens { image-rendering: pixelated; }
.strip figcaption {
  font-size: 12px; color: var(--muted); margin-top: 3px; line-height: 1.35;
  font-variant-numeric: tabular-nums;
}
.words {
  margin: 10px 0 0; font-size: 14px; line-height: 1.45; display: grid; grid-template-columns: auto 1fr;
  gap: 2px 12px;
}
.words dt { color: var(--muted); } .words dd { margin: 0; overflow-wrap: anywhere; }
.marks { display: inline-flex; flex-wrap: wrap; gap: 3px 10px; font-size: 12.5px; }
.yes { color: var(--good); } .no { color: var(--bad); }
.tables { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); align-items: start; }
.table { padding: 16px 18px; min-width: 0; } .wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--muted); padding: 4px 0 6px 16px; white-space: nowrap; }
td { text-align: right; padding: 6px 0 6px 16px; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; min-width: 9em; }
td.main { font-weight: 650; } td small { color: var(--muted); font-size: 12px; font-weight: 400; }
td.muted { color: var(--muted); }
details { margin-top: 10px; font-size: 13px; color: var(--muted); } summary { cursor: pointer; }
details p { margin: 6px 0 0; overflow-wrap: anywhere; max-width: none; }
.keys { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 14px; margin: 0; }
.keys dt { color: var(--muted); } .keys dd { margin: 0; overflow-wrap: anywhere; }
pre {
  background: var(--soft); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 12px 0 0;
  font-size: 13px; line-height: 1.6;
}
pre, code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
img.grid { max-width: 100%; border-radius: 6px; display: block; }
footer {
  margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted);
  font-size: 13px;
}
@media (max-width: 560px) {
  main { padding: 26px 16px 48px; } h1 { font-size: 25px; } h2 { margin-top: 40px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; } .tile { padding: 12px 13px; } .tile .value { font-size: 25px; }
  .strip { grid-template-columns: 1fr 1fr; } .charts { grid-template-columns: 1fr; }
  .keys { grid-template-columns: 1fr; } .keys dd { margin-bottom: 6px; }
  .words { grid-template-columns: 1fr; } .words dd { margin-bottom: 4px; }
  table { font-size: 13px; } td small { display: block; }
  th, td { padding-left: 10px; } td:first-child { min-width: 6.5em; }
}
@media print { .card { break-inside: avoid; } }
"""
