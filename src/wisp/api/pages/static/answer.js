// How an answer looks: coloured tokens, its figures, why there were no drafts, and its rounds on a line of time.
"use strict";
wisp.answer = (() => {
  const { html } = window.htmPreact;
  const { number, percent } = wisp;

  const ORIGINS = {
    draft: "accepted draft",
    correction: "correction by the target",
    bonus: "the target's own, after a whole draft",
    server: "decoded by the server",
    forced: "forced by a grammar",
  };

  const Legend = () => html`<ul class="legend" aria-label="Colours of tokens">
    ${Object.entries(ORIGINS).map(([name, text]) => html`<li><span class="token ${name}">token</span> ${text}</li>`)}
  </ul>`;

  const Tokens = ({ answer }) => html`<div class="text ${answer.running ? "busy" : ""}" data-testid="text">
    ${answer.tokens.map((t, i) => html`<span key=${i} class="token ${t.from}" title=${ORIGINS[t.from]}>${t.text}</span>`)}
    ${answer.calls.map((c) => html`<pre class="call">${c.name}(${c.arguments})</pre>`)}
    ${!answer.tokens.length && answer.running && html`<span class="soft">waiting for the first token</span>`}
    ${!answer.tokens.length && !answer.running && !answer.error && html`<span class="soft">an empty answer</span>`}
  </div>`;

  const Figure = ({ name, value, title }) => html`<div title=${title}><dt>${name}</dt><dd>${value}</dd></div>`;

  function Figures({ answer }) {
    const f = wisp.generation.figures(answer);
    return html`<dl class="figures" data-testid="figures">
      <${Figure} name="tokens/s" value=${number(f.speed, 1)} title="Tokens after the first, over the time since the first" />
      <${Figure} name="first token" value=${Number.isFinite(f.ttft) ? `${number(f.ttft)} ms` : "–"} title="From the request to the first token (TTFT)" />
      <${Figure} name="tokens" value=${number(f.n)} />
      <${Figure} name="accepted" value=${percent(f.acceptance)} title="${f.accepted} of ${f.drafted} draft tokens" />
      <${Figure} name="draft length" value=${number(f.length, 1)} title="Tokens per draft, of ${f.drafts} drafts" />
      <${Figure} name="draft steps/token" value=${number(f.stepsPerToken, 2)} title="Steps of the draft model for each token of the answer: a measure of the device's energy" />
    </dl>`;
  }

  // The reason for most of the rounds without a draft, if there were hardly any drafts.
  function why(answer, reasons) {
    const counted = {};
    let without = 0;
    for (const round of answer.rounds) {
      if (round.why) counted[round.why] = (counted[round.why] || 0) + 1;
      if (!round.drafted) without += 1;
    }
    const [most] = Object.entries(counted).sort((a, b) => b[1] - a[1]);
    if (!most || without * 2 <= answer.rounds.length) return "";
    return reasons[most[0]] || most[0];
  }

  const LANES = [["device", "draft"], ["network", "flight"], ["verifier", "verify"]];
  const SHOWN = 150; // rounds on a line

  // Parts of rounds as {lane, from, ms, kind}; times in ms since the session began.
  function parts(rounds) {
    const found = [];
    for (const r of rounds) {
      const sent = r.at_ms - r.flight_ms - r.queue_ms - r.verify_ms;
      const half = r.flight_ms / 2;
      if (r.draft_ms) found.push({ lane: 0, from: Math.max(0, sent - r.draft_ms), ms: r.draft_ms, kind: r.ahead ? "ahead" : "draft" });
      if (half) found.push({ lane: 1, from: sent, ms: half, kind: "flight" });
      if (r.queue_ms) found.push({ lane: 2, from: sent + half, ms: r.queue_ms, kind: "queue" });
      if (r.verify_ms) found.push({ lane: 2, from: sent + half + r.queue_ms, ms: r.verify_ms, kind: "verify" });
      if (half) found.push({ lane: 1, from: r.at_ms - half, ms: half, kind: "flight" });
    }
    return found;
  }

  function Timeline({ answer }) {
    const rounds = answer.rounds.slice(-SHOWN);
    if (!rounds.length) return null;
    const shown = parts(rounds);
    const begin = Math.max(0, Math.min(...shown.map((p) => p.from), rounds[0].at_ms));
    const span = Math.max(1, rounds[rounds.length - 1].at_ms - begin);
    const total = (name) => number(wisp.generation.sum(answer.rounds, name));
    const label = `${answer.rounds.length} rounds: drafting ${total("draft_ms")} ms, on the way ${total("flight_ms")} ms, ` +
      `queue ${total("queue_ms")} ms, verifying ${total("verify_ms")} ms`;
    return html`<figure class="timeline">
      <svg viewBox="0 0 1000 66" preserveAspectRatio="none" role="img" aria-label=${label} data-testid="timeline">
        ${LANES.map((_, i) => html`<rect class="lane" x="0" y=${i * 22 + 2} width="1000" height="18" />`)}
        ${shown.map((p) => html`<rect class=${p.kind} x=${(p.from - begin) / span * 1000} y=${p.lane * 22 + 2}
          width=${Math.max(1, p.ms / span * 1000)} height="18"><title>${p.kind} ${number(p.ms, 1)} ms</title></rect>`)}
      </svg>
      <ol class="lanes" aria-hidden="true">${LANES.map(([who]) => html`<li>${who}</li>`)}</ol>
      <figcaption class="soft small"><span>${number(begin / 1e3, 2)} s</span><span>${number((begin + span) / 1e3, 2)} s</span><p>${label}</p></figcaption>
      <${Rounds} rounds=${rounds} />
    </figure>`;
  }

  const Rounds = ({ rounds }) => html`<details class="small"><summary>Rounds as a table</summary>
    <div class="scroll" tabindex="0" role="region" aria-label="Rounds"><table>
      <thead><tr>${["at", "draft", "way", "queue", "verify", "drafted", "accepted", "price"].map((h) => html`<th class="n">${h}</th>`)}</tr></thead>
      <tbody>${rounds.map((r) => html`<tr>${[
        `${number(r.at_ms)} ms`, `${number(r.draft_ms, 1)}${r.ahead ? " ahead" : ""}`, number(r.flight_ms, 1), number(r.queue_ms, 1),
        number(r.verify_ms, 1), r.drafted, r.accepted, number(r.price, 3),
      ].map((cell) => html`<td class="n">${cell}</td>`)}</tr>`)}</tbody>
    </table></div></details>`;

  // Whatever is known of one run of a prompt.
  function Answer({ answer, title, reasons, again }) {
    const reason = answer.draft ? why(answer, reasons) : "";
    return html`<article class="answer" aria-label=${title} aria-busy=${answer.running}>
      ${title && html`<h3>${title}</h3>`}
      <p class="hidden" role="status">${answer.running ? "Answering." : answer.error ? "" : `Answered: ${answer.text}`}</p>
      <${Tokens} answer=${answer} />
      ${answer.error && html`<div class="note bad" role="alert">${answer.error.message} ${again && html`<button class="quiet" onClick=${again}>Try again</button>`}</div>`}
      ${answer.finish === "length" && html`<p class="soft small">Cut off at the most tokens that were asked for.</p>`}
      ${answer.finish === "stopped" && html`<p class="soft small">Stopped.</p>`}
      ${reason && html`<p class="note small" data-testid="why">Hardly any drafts. ${reason}</p>`}
      ${answer.tokens.length > 0 && html`<${Figures} answer=${answer} />`}
      <${Timeline} answer=${answer} />
    </article>`;
  }

  return { Answer, Legend };
})();
