// Figures over time: one uPlot for each question an operator has.
"use strict";
wisp.charts = (() => {
  const { html, useEffect, useRef, useState } = window.htmPreact;
  const { number } = wisp;
  const short = (v, digits) => v.toLocaleString("en", { maximumFractionDigits: digits });
  const ms = (v) => (v === 0 ? "0" : Math.abs(v) >= 1000 ? `${short(v / 1e3, 1)} s` : `${short(v, Math.abs(v) < 10 ? 1 : 0)} ms`);
  const share = (v) => wisp.percent(v);
  const whole = (v) => short(v, v < 10 ? 1 : 0);

  // title, what it tells, how values read, the least height of the scale, and [column, label] of up to four lines
  const CHARTS = [
    ["Committed tokens", "Tokens per second, and those of sessions within their SLO", whole, 10, [["tokens_per_s", "committed"], ["goodput", "goodput"]]],
    ["Time of a step", "From dispatch to commit, and the cost model's estimate", ms, 10, [["step_ms", "measured"], ["estimate_ms", "estimate"]]],
    ["Rows by kind", "Tokens fed to the engine per second", whole, 10, [["verify_rows", "verify"], ["decode_rows", "decode"], ["prefill_rows", "prefill"]]],
    ["KV and engine", "Share of KV that live sessions hold; share of time with a step under way", share, 1, [["kv", "KV held"], ["busy", "engine busy"]]],
    ["Slack at dispatch", "How long before its next token is due a session with an SLO is served", ms, 100, [["slack_p50_ms", "median"], ["slack_p10_ms", "lowest tenth"]]],
    ["Verification interference", "Time of a slice's step beyond what the slice alone would take", ms, 10, [["interference_p50_ms", "median"], ["interference_p95_ms", "95th percentile"]]],
    ["Price of a draft token", "What one more costs other sessions, in committed tokens", (v) => short(v, 3), 0.01, [["price", "price"]]],
    ["Admissions", "Sessions per second", whole, 2, [["admitted", "admitted"], ["refused", "refused"]]],
    ["Sessions", "With a KV slot, and those that could run but have none", whole, 4, [["running", "with a slot"], ["waiting", "without"]]],
    ["Ends of sessions", "Per second, by whether the SLO was kept as seen here", whole, 2, [["met", "within SLO"], ["missed", "missed"]]],
  ];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const SHOWN_S = 60; // a chart shows at least so much time
  const clockTime = (t) => new Date(t * 1e3).toLocaleTimeString("en", { hour12: false });
  const runTime = (t) => `${number(t)} s`;

  function options(width, { lines, format, least, window: window_, clock }, hover) {
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const time = clock === "unix" ? clockTime : runTime;
    return {
      width, height: 150, padding: [10, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "wisp" }, points: { size: 6 }, y: false, drag: { x: false, y: false } },
      scales: {
        x: { time: false, range: (_, low, high) => [Math.min(low, high - SHOWN_S), high] },
        y: { range: (_, low, high) => [Math.min(0, low || 0), Math.max((high || 0) * 1.08, least)] },
      },
      axes: [
        { ...axis, size: 26, space: 80, values: (_, values) => values.map(time) },
        { ...axis, size: 60, values: (_, values) => values.map(format) },
      ],
      series: [{}, ...lines.map((_, i) => ({ stroke: colour(`--c${i + 1}`), width: 1.6, spanGaps: false, points: { size: 4 } }))],
      hooks: {
        setCursor: [(u) => hover(u.cursor.idx)],
        drawClear: window_ ? [(u) => shade(u, window_)] : [],
      },
    };
  }

  // The window that counts, in a simulated run.
  function shade(u, [from, to]) {
    const x = u.valToPos(from, "x", true), end = u.valToPos(to, "x", true);
    u.ctx.fillStyle = colour("--good-ground");
    u.ctx.globalAlpha = 0.6;
    u.ctx.fillRect(Math.max(x, u.bbox.left), u.bbox.top, Math.min(end, u.bbox.left + u.bbox.width) - Math.max(x, u.bbox.left), u.bbox.height);
    u.ctx.globalAlpha = 1;
  }

  function Chart(given) {
    const { title, about, format, lines, series } = given;
    const place = useRef(null);
    const plot = useRef(null);
    const [at, hover] = useState(null);
    const data = [series.t, ...lines.map(([column]) => series[column])];
    const n = series.t.length;

    useEffect(() => {
      const make = () => {
        if (plot.current) plot.current.destroy();
        plot.current = new uPlot(options(place.current.clientWidth, given, hover), plot.current ? plot.current.data : data, place.current);
      };
      make();
      const resized = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height: 150 }));
      resized.observe(place.current);
      const dark = matchMedia("(prefers-color-scheme: dark)");
      dark.addEventListener("change", make);
      return () => {
        resized.disconnect();
        dark.removeEventListener("change", make);
        plot.current.destroy();
        plot.current = null;
      };
    }, []);
    useEffect(() => plot.current && plot.current.setData(data), [series]);

    const index = at === null || at === undefined || at >= n ? lastKnown(data) : at;
    const value = (i) => (index < 0 || data[i + 1][index] === null ? "–" : format(data[i + 1][index]));
    const label = `${title}: ${lines.map(([, name], i) => `${name} ${value(i)}`).join(", ")}`;
    return html`<section class="card chart" role="img" aria-label=${label} title=${about}>
      <header><h3>${title}</h3><ul>${lines.map(([, name], i) => html`<li class="s${i + 1}">${name} <b>${value(i)}</b></li>`)}</ul></header>
      <div class="plot" ref=${place}></div>
    </section>`;
  }

  function lastKnown(data) {
    for (let i = data[0].length - 1; i >= 0; i -= 1) if (data.slice(1).some((line) => line[i] !== null)) return i;
    return -1;
  }

  const Charts = ({ series, clock, window: window_ }) => html`<div class="charts">
    ${CHARTS.map(([title, about, format, least, lines]) => html`<${Chart} key=${title} title=${title} about=${about} format=${format} least=${least} lines=${lines}
      series=${series} clock=${clock} window=${window_} />`)}
  </div>`;

  return { Charts, lastKnown };
})();
