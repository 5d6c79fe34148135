// Devices, sessions, SLO classes and replicas.
"use strict";
wisp.tables = (() => {
  const { html, useState } = window.htmPreact;
  const { number, percent } = wisp;

  const WAITS = {
    edge: "its device: the next draft",
    engine: "the step in the engine",
    step: "a place in the next step",
    slot: "a KV slot",
    edge_gone: "its device to come back",
  };

  function Section({ title, note, empty, rows, head, children }) {
    return html`<section class="card section" aria-label=${title}>
      <header><h2>${title}</h2>${note && html`<span class="soft small">${note}</span>`}</header>
      ${rows === 0 ? html`<p class="empty">${empty}</p>`
        : html`<div class="scroll" tabindex="0" role="region" aria-label="${title}, as a table"><table>
            <thead><tr>${head.map(([text, n]) => html`<th scope="col" class=${n ? "n" : ""}>${text}</th>`)}</tr></thead>
            <tbody>${children}</tbody></table></div>`}
    </section>`;
  }

  const N = ({ children, title }) => html`<td class="n" title=${title}>${children}</td>`;

  function Attained({ met, ended }) {
    if (!ended) return "–";
    const part = met / ended;
    return html`<span class="meter ${part < 0.9 ? "low" : ""}" aria-hidden="true"><svg viewBox="0 0 100 10" preserveAspectRatio="none"><rect width=${part * 100} height="10" /></svg></span>${percent(part)} <span class="soft">of ${ended}</span>`;
  }

  const targets = (c) => [c.ttft_ms && `TTFT ${number(c.ttft_ms)} ms`, c.tpot_ms && `TPOT ${number(c.tpot_ms, 1)} ms`].filter(Boolean).join(", ");

  const Classes = ({ classes }) => html`<${Section} title="SLO attainment" note="as seen from here, of sessions that have ended" rows=${classes.length}
      empty="No session with an SLO has ended yet." head=${[["class"], ["targets"], ["attained"]]}>
    ${classes.map((c) => html`<tr data-testid="class"><td>${c.name || "–"}</td><td>${targets(c)}</td><td><${Attained} ...${c} /></td></tr>`)}
  <//>`;

  const name = (d) => (d.thin ? "clients without an edge" : d.name ? `${d.name} #${d.id}` : `#${d.id}`);

  const Devices = ({ devices, n, replicas }) => html`<${Section} title="Devices" note=${shown(devices.length, n)} rows=${devices.length}
      empty="No device is connected. Start one with wisp edge --server and this address."
      head=${[["device"], ...(replicas ? [["replica"]] : []), ["key"], ["drafts, tokens/s", 1], ["RTT", 1], ["accepted", 1], ["answers, tokens/s", 1], ["sessions", 1], ["SLO"], ["attained"]]}>
    ${devices.map((d) => html`<tr key=${`${d.replica}/${d.id}`}>
      <td>${name(d)}</td>${replicas && html`<td>${d.replica}</td>`}<td>${d.key || "–"}</td>
      <${N}>${number(d.draft_per_s)}<//><${N}>${d.rtt_ms === null ? "–" : `${number(d.rtt_ms)} ms`}<//>
      <${N} title="${d.accepted} of ${d.drafted} draft tokens">${d.drafted ? percent(d.accepted / d.drafted) : "–"}<//>
      <${N}>${number(d.speed, 1)}<//><${N}>${d.sessions}<//><td>${d.slo || "–"}</td><td><${Attained} ...${d} /></td>
    </tr>`)}
  <//>`;

  const shown = (some, all) => (some < all ? `${some} of ${number(all)}` : all ? number(all) : "");

  const slack = (s) => (s.slack_ms === null ? "–" : s.slo_lost ? "SLO lost" : `${number(s.slack_ms / 1e3, 1)} s`);

  const Sessions = ({ sessions, n, replicas, over }) => html`<${Section} title=${over ? "Sessions at the end of the window" : "Sessions now"} note=${shown(sessions.length, n)}
      rows=${sessions.length} empty=${over ? "No session was open then." : "No session is open."}
      head=${[["session"], ["device"], ...(replicas ? [["replica"]] : []), ["waits for"], ["since", 1], ["tokens", 1], ["acceptance", 1], ["slack", 1]]}>
    ${sessions.map((s) => html`<tr key=${s.id}><td>${s.id}</td><td>${s.device === null ? "–" : s.device < 0 ? "none" : `#${s.device}`}</td>${replicas && html`<td>${s.replica}</td>`}
      <td>${WAITS[s.waits_for] || s.waits_for}</td><${N}>${number(s.since_s, 2)} s<//><${N} title="after a prompt of ${s.prompt}">${s.tokens}<//>
      <${N}>${percent(s.acceptance)}<//><${N}>${slack(s)}<//></tr>`)}
  <//>`;

  function Replicas({ replicas, launcher }) {
    const [busy, setBusy] = useState("");
    const [said, setSaid] = useState(null);
    const act = async (name, what) => {
      if (!confirm(what === "drain" ? `Move the sessions of ${name} to the others, and end it for good?` : `Move the sessions of ${name} to the others, and start it afresh?`)) return;
      setBusy(name);
      setSaid(null);
      try {
        await wisp.ask(`/v1/replicas/${encodeURIComponent(name)}/${what}`, { body: {} });
        setSaid({ good: true, text: `${name}: ${what} done.` });
      } catch (error) {
        setSaid({ text: error.message });
      }
      setBusy("");
    };
    return html`<${Section} title="Replicas" note=${`launcher: ${launcher}`} rows=${replicas.length} empty="There is no replica."
        head=${[["replica"], ["state"], ["address"], ["sessions", 1], ["restarts", 1], ["last end"], [""]]}>
      ${replicas.map((r) => html`<tr key=${r.name}><td>${r.name}</td>
        <td><span class="chip ${r.state === "up" ? "good" : r.state === "silent" || r.state === "down" ? "bad" : "warn"}">${r.state}</span></td>
        <td>${r.address || "–"}</td><${N}>${r.sessions}<//><${N}>${r.restarts}<//><td>${r.last_end || "–"}</td>
        <td><div class="actions">
          <button disabled=${Boolean(busy)} onClick=${() => act(r.name, "drain")} aria-label="Drain ${r.name}">Drain</button>
          <button disabled=${Boolean(busy)} onClick=${() => act(r.name, "restart")} aria-label="Restart ${r.name}">Restart</button>
        </div></td></tr>`)}
    <//>
    <div role="status">${busy && html`<p class="note">${busy} is being emptied.</p>`}${said && html`<p class="note ${said.good ? "good" : "bad"}">${said.text}</p>`}</div>`;
  }

  return { Classes, Devices, Sessions, Replicas };
})();
