// The side of the playground: what goes into requests, what the edge says of itself, and the request as code.
"use strict";
wisp.settings = (() => {
  const { html, useState } = window.htmPreact;
  const { number, percent } = wisp;

  const DEFAULTS = {
    system: "", temperature: "0", top_p: "", top_k: "", min_p: "", seed: "", max_tokens: "256", ignore_eos: false, tools: "", schema: "",
  };
  const NUMBERS = [
    ["temperature", "Temperature", "0 is greedy"], ["top_p", "Top p", "1"], ["top_k", "Top k", "off"], ["min_p", "Min p", "0"],
    ["max_tokens", "Most tokens", "all that fit"], ["seed", "Seed", "drawn"],
  ];

  const WIDE = matchMedia("(min-width: 56rem)").matches;

  function wrongJson(text) {
    if (!text.trim()) return "";
    try {
      JSON.parse(text);
      return "";
    } catch (error) {
      return error.message;
    }
  }

  const valid = (settings) => !wrongJson(settings.tools) && !wrongJson(settings.schema);

  function Json({ name, label, hint, settings, set }) {
    const wrong = wrongJson(settings[name]);
    return html`<div>
      <label for=${name}>${label}</label>
      <textarea id=${name} spellcheck=${false} placeholder=${hint} value=${settings[name]} aria-invalid=${Boolean(wrong)}
        aria-describedby="${name}-wrong" onInput=${(e) => set(name, e.target.value)}></textarea>
      <p class="wrong" id="${name}-wrong" role="status">${wrong}</p>
    </div>`;
  }

  const Settings = ({ settings, set }) => html`<details class="card" open=${WIDE}><summary><strong>Request</strong></summary><div class="settings">
    <div><label for="system">System message</label>
      <textarea id="system" value=${settings.system} onInput=${(e) => set("system", e.target.value)}></textarea></div>
    <div class="pairs">
      ${NUMBERS.map(([name, label, hint]) => html`<div><label for=${name}>${label}</label>
        <input id=${name} inputmode="decimal" placeholder=${hint} value=${settings[name]} onInput=${(e) => set(name, e.target.value)} /></div>`)}
    </div>
    <label class="check"><input type="checkbox" checked=${settings.ignore_eos} onChange=${(e) => set("ignore_eos", e.target.checked)} /> Go on past the end of the answer</label>
    <${Json} name="tools" label="Tools (JSON list)" hint=${'[{"type": "function", "function": {"name": "..."}}]'} settings=${settings} set=${set} />
    <${Json} name="schema" label="JSON schema of the answer" hint=${'{"type": "object", "properties": {}}'} settings=${settings} set=${set} />
  </div></details>`;

  const Fact = ({ name, value }) => html`<dt>${name}</dt><dd>${value}</dd>`;

  function State({ status }) {
    if (!status) return null;
    const d = status.drafting, v = status.verifier;
    return html`<section class="card state" aria-label="This edge"><h2>This edge</h2><dl class="facts">
      <${Fact} name="drafter" value=${d.drafter || "none"} />
      <${Fact} name="policy" value=${`${d.policy}${d.ahead ? ", ahead" : ""}`} />
      <${Fact} name="draft speed" value=${d.draft_per_s ? `${number(d.draft_per_s)} tokens/s` : "–"} />
      <${Fact} name="acceptance" value=${percent(d.acceptance)} />
      <${Fact} name="way there and back" value=${d.line_ms === null ? "–" : `${number(d.line_ms, 1)} ms`} />
      <${Fact} name="price of a draft token" value=${number(d.price, 3)} />
      <${Fact} name="verifier's mode" value=${v.mode || "–"} />
      <${Fact} name="context" value=${v.context ? `${number(v.context)} tokens` : "–"} />
    </dl>
    ${d.why && html`<p class="note small" data-testid="edge-why">Not drafting. ${status.reasons[d.why]}</p>`}
    </section>`;
  }

  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

  function curl(request) {
    const plain = { ...request, stream: false };
    delete plain.stream_options;
    delete plain.wisp;
    return `curl ${location.origin}/v1/chat/completions \\\n  -H "Authorization: Bearer $WISP_API_KEY" \\\n` +
      `  -H "Content-Type: application/json" \\\n  -d ${quoted(JSON.stringify(plain))}`;
  }

  const literal = (value) => JSON.stringify(value).replace(/\btrue\b|\bfalse\b|\bnull\b|"(?:[^"\\]|\\.)*"/g,
    (word) => ({ true: "True", false: "False", null: "None" })[word] || word);

  function python(request) {
    const known = ["model", "messages", "seed", "temperature", "top_p", "max_tokens", "tools", "response_format"];
    const extra = Object.fromEntries(["top_k", "min_p", "ignore_eos"].filter((n) => n in request).map((n) => [n, request[n]]));
    const lines = known.filter((n) => n in request).map((n) => `    ${n}=${literal(request[n])},`);
    if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra)},`);
    return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("WISP_API_KEY", "none"))\n` +
      `answer = client.chat.completions.create(\n${lines.join("\n")}\n)\nprint(answer.choices[0].message.content)`;
  }

  function Code({ request }) {
    const [code, setCode] = useState("");
    const [said, setSaid] = useState("");
    const show = (text) => {
      setCode(text);
      setSaid("");
      if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => setSaid("Copied."), () => setSaid("Select it to copy it."));
    };
    return html`<section class="card settings" aria-label="The request as code"><h2>As code</h2>
      <div class="row"><button disabled=${!request} onClick=${() => show(curl(request()))}>Copy as curl</button>${" "}
      <button disabled=${!request} onClick=${() => show(python(request()))}>Copy as Python</button></div>
      ${code && html`<pre class="code" tabindex="0" data-testid="code">${code}</pre>`}
      <p class="soft small" role="status">${said}</p>
    </section>`;
  }

  return { DEFAULTS, Settings, State, Code, valid };
})();
