// The page of a verifier, of a router's fleet, or of a run that is over.
"use strict";
(() => {
  const { html, render, useState, useEffect, useRef } = window.htmPreact;
  const { number, percent } = wisp;
  const KEPT = 600; // rows of series
  const given = document.getElementById("run");

  // A snapshot after another: rows of series are added, everything else is replaced.
  function merged(before, now) {
    if (!before || !before.series || before.kind !== now.kind) return now;
    if (!now.series) return { ...before, ...now }; // no replica answered in time
    const known = before.series.t;
    const last = known.length ? known[known.length - 1] : -Infinity;
    const fresh = now.series.t.map((t, i) => (t > last ? i : -1)).filter((i) => i >= 0);
    const series = fresh.length ? {} : before.series;
    if (fresh.length) {
      for (const name of Object.keys(now.series)) series[name] = [...before.series[name], ...fresh.map((i) => now.series[name][i])].slice(-KEPT);
    }
    return { ...now, series };
  }

  function useStatus() {
    const [status, setStatus] = useState(given ? JSON.parse(given.textContent) : null);
    const [trouble, setTrouble] = useState(null);
    const [round, again] = useState(0);
    const latest = useRef(status);
    useEffect(() => {
      if (given) return;
      wisp.follow((now) => setStatus((latest.current = merged(latest.current, now))), setTrouble);
    }, [round]);
    return { status, trouble, again: () => { setTrouble(null); again((n) => n + 1); } };
  }

  const Tile = ({ name, value, more, test }) => html`<div><dt>${name}</dt><dd data-testid=${test}>${value} ${more && html`<small>${more}</small>`}</dd></div>`;

  function latest(series, name) {
    const i = wisp.charts.lastKnown([series.t, series[name]]);
    return i < 0 ? null : series[name][i];
  }

  const total = (rows, name) => rows.reduce((sum, row) => sum + row[name], 0);

  function Tiles({ status: s }) {
    const over = s.kind === "run";
    const ended = total(s.classes, "ended"), met = total(s.classes, "met");
    const attained = over && Number.isFinite(s.attainment) && s.attainment !== null ? s.attainment : ended ? met / ended : NaN;
    const drafted = total(s.devices, "drafted");
    return html`<dl class="tiles" aria-label="Figures now">
      <${Tile} name="SLO attained" value=${percent(attained, 1)} more=${over && s.attainment ? "in the window" : ended ? `of ${number(ended)}` : ""} test="attainment" />
      ${over && Number.isFinite(s.goodput) ? html`<${Tile} name="goodput" value=${number(s.goodput)} more="tokens/s" />`
        : html`<${Tile} name="goodput" value=${number(latest(s.series, "goodput"))} more="tokens/s" />`}
      ${!over && html`<${Tile} name="committed" value=${number(latest(s.series, "tokens_per_s"))} more="tokens/s" test="tokens" />`}
      <${Tile} name="devices" value=${number(s.n_devices)} />
      ${!over && html`<${Tile} name="sessions" value=${number(s.n_sessions)} test="sessions" />`}
      <${Tile} name="accepted" value=${drafted ? percent(total(s.devices, "accepted") / drafted) : "–"} more="of draft tokens" />
      <${Tile} name="KV held" value=${percent(s.kv.used / s.kv.all)} more="of ${number(s.kv.all)}" />
      <${Tile} name="estimates off" value=${percent(s.cost_model.error, 1)} more="median" />
    </dl>`;
  }

  const STATES = { ok: "good", over: "", loading: "warn", draining: "warn", failed: "bad" };
  const TITLES = { verifier: "verifier", router: "fleet", run: "run" };

  function Header({ status: s, trouble }) {
    const state = trouble ? "no answer" : s.state;
    return html`<header class="bar">${given ? html`<div class="brand"><h1>WISP <span class="soft">run</span></h1></div>` : html`<${wisp.Brand} title=${TITLES[s.kind] || ""} />`}
      ${s.title && html`<span>${s.title}</span>`}<span class="grow"></span>
      <span>${s.model}</span>
      ${s.engine && html`<span class="chip">${s.engine}${s.mode ? `, ${s.mode}` : ""}</span>`}
      ${s.system && html`<span class="chip">system ${s.system}, seed ${s.seed}</span>`}
      ${s.batching && html`<span class="chip">batching ${s.batching}</span>`}
      <span class="chip ${trouble ? "bad" : STATES[s.state] || ""}" role="status">${state}</span>
      <span class="soft small">${s.version}</span>
    </header>`;
  }

  function Body({ status: s }) {
    if (s.state === "loading" && !s.series) return html`<p class="empty">The model is still loading. The page fills by itself.</p>`;
    if (!s.series) return html`<p class="note bad" role="alert">${s.problem || "There is nothing to show."}</p>`;
    const fleet = s.kind === "router";
    return html`<${Tiles} status=${s} />
      ${s.series.t.length ? html`<${wisp.charts.Charts} series=${s.series} clock=${s.clock} window=${s.window} />`
        : html`<p class="empty">Nothing has happened yet. Charts begin with the first session.</p>`}
      ${fleet && html`<${wisp.tables.Replicas} replicas=${s.replicas} launcher=${s.launcher} />`}
      <div class="columns"><${wisp.tables.Classes} classes=${s.classes} />
        <${wisp.tables.Sessions} sessions=${s.sessions} n=${s.n_sessions} replicas=${fleet} over=${s.kind === "run"} /></div>
      <${wisp.tables.Devices} devices=${s.devices} n=${s.n_devices} replicas=${fleet} />`;
  }

  function Page() {
    const { status, trouble, again } = useStatus();
    if (trouble && trouble.wantsKey) return html`<main><${wisp.KeyForm} error=${trouble} given=${again} /></main>`;
    return html`${status && html`<${Header} status=${status} trouble=${trouble} />`}
      <main class="page">
        ${trouble && html`<p class="note bad" role="alert" data-testid="trouble">${trouble.message} The page tries again by itself.</p>`}
        ${status ? html`<${Body} status=${status} />` : !trouble && html`<p class="empty">Looking.</p>`}
      </main>`;
  }

  render(html`<${Page} />`, document.getElementById("page"));
})();
