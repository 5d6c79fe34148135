// The playground: a chat with the target through this edge, and the same prompt beside the target alone.
"use strict";
(() => {
  const { html, render, useState, useEffect, useRef } = window.htmPreact;
  const { generation, settings: side, answer: view } = wisp;
  const SEEDS = 2 ** 31;

  function useStatus() {
    const [status, setStatus] = useState(null);
    const [trouble, setTrouble] = useState(null);
    const [round, again] = useState(0);
    useEffect(() => void wisp.follow(setStatus, setTrouble), [round]);
    return { status, trouble, setTrouble, again: () => { setTrouble(null); again((n) => n + 1); } };
  }

  // At most one drawing per frame, however many tokens come.
  function useDrawing() {
    const [, draw] = useState(0);
    const due = useRef(false);
    return () => {
      if (due.current) return;
      due.current = true;
      requestAnimationFrame(() => { due.current = false; draw((n) => n + 1); });
    };
  }

  function Trouble({ status, trouble }) {
    if (trouble) return html`<p class="note bad" role="alert" data-testid="trouble">${trouble.message} The page tries again by itself.</p>`;
    if (!status || status.verifier.connected) return null;
    return html`<p class="note" role="alert" data-testid="trouble"><strong>No verifier at ${status.verifier.address}</strong>: ${status.verifier.problem}.
      This edge tries again by itself; open answers wait, and go on where they were.</p>`;
  }

  function Verdict({ turn, mode }) {
    const [one, other] = turn.answers;
    if (!other || one.running || other.running || one.error || other.error) return null;
    if (one.finish === "stopped" || other.finish === "stopped") return null;
    const found = generation.difference(one, other);
    if (!found) {
      return html`<p class="note good" role="status" data-testid="verdict"><strong>identical</strong>: both runs wrote the same
        ${" "}${other.tokens.length} tokens, with seed ${turn.seed}. The second run found the prompt in the verifier's cache, so its first
        token says nothing about drafts.</p>`;
    }
    const close = Number.isFinite(found.gap) ? ` The target's log probabilities of the two differ by ${wisp.number(Math.abs(found.gap), 4)}.` : "";
    const tie = mode === "fast" ? ` This verifier runs in fast mode, where kernels round differently for different batches, and two tokens
      whose scores are that close may change places: then it is a tie.${close}` : "";
    return html`<p class="note" role="status" data-testid="verdict"><strong>First difference at token ${found.at + 1}</strong>, after
      “…${found.before}”: “${found.one}” with drafts, “${found.other}” alone.${tie}</p>`;
  }

  function Turn({ turn, reasons, mode, again }) {
    const two = turn.answers.length > 1;
    return html`<section class="turn" aria-label="Question and answer">
      <p class="user">${turn.prompt}</p>
      <${Verdict} turn=${turn} mode=${mode} />
      <div class=${two ? "both" : ""}>
        ${turn.answers.map((a) => html`<${view.Answer} answer=${a} reasons=${reasons} again=${again}
          title=${two ? (a.draft ? "With drafts" : "The target alone") : ""} />`)}
      </div>
    </section>`;
  }

  function Compose({ running, ready, send, stop, clear }) {
    const [text, setText] = useState("");
    const [beside, setBeside] = useState(false);
    const go = () => {
      if (running || !ready || !text.trim()) return;
      send(text, beside);
      setText("");
    };
    const typed = (e) => {
      if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
        e.preventDefault();
        go();
      }
    };
    return html`<div class="compose">
      <label class="hidden" for="prompt">Your message</label>
      <textarea id="prompt" placeholder="Ask the target something. Enter sends, Shift+Enter breaks the line." value=${text}
        onInput=${(e) => setText(e.target.value)} onKeyDown=${typed}></textarea>
      <div class="row">
        <label class="check"><input type="checkbox" role="switch" checked=${beside} onChange=${(e) => setBeside(e.target.checked)} /> Beside the target alone</label>
        <span class="grow"></span>
        <button class="quiet" onClick=${clear} disabled=${running || !clear}>New chat</button>
        ${running ? html`<button onClick=${stop}>Stop</button>` : html`<button class="main" onClick=${go} disabled=${!ready || !text.trim()}>Send</button>`}
      </div>
    </div>`;
  }

  function Page() {
    const { status, trouble, setTrouble, again } = useStatus();
    const [settings, setSettings] = useState(side.DEFAULTS);
    const [turns, setTurns] = useState([]);
    const running = useRef(null);
    const draw = useDrawing();
    const set = (name, value) => setSettings((s) => ({ ...s, [name]: value }));
    const verifier = status ? status.verifier : {};
    const asked = { ...settings, model: verifier.model || "" };

    function history(earlier, prompt) {
      const said = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
      for (const turn of earlier) {
        if (turn.answers[0].text) said.push({ role: "user", content: turn.prompt }, { role: "assistant", content: turn.answers[0].text });
      }
      return [...said, { role: "user", content: prompt }];
    }

    async function send(earlier, prompt, beside) {
      const seed = settings.seed === "" ? Math.floor(Math.random() * SEEDS) : Number(settings.seed);
      const messages = history(earlier, prompt);
      const turn = { prompt, seed, beside, answers: [] };
      const abort = (running.current = new AbortController());
      setTurns([...earlier, turn]);
      const logprobs = beside && verifier.mode === "fast"; // how close was it?
      for (const draft of beside ? [true, false] : [true]) {
        const answer = generation.fresh(draft);
        turn.answers.push(answer);
        draw();
        await generation.run(answer, generation.body({ ...asked, logprobs }, messages, seed, draft), abort.signal, draw);
        if (answer.error && answer.error.wantsKey) setTrouble(answer.error);
        if (answer.error || answer.finish === "stopped") break;
      }
      running.current = null;
      draw();
    }

    if (trouble && trouble.wantsKey) return html`<main><${wisp.KeyForm} error=${trouble} given=${again} /></main>`;
    const ready = Boolean(verifier.model) && side.valid(settings);
    const request = () => generation.body(asked, history(turns.slice(0, -1), turns.length ? turns[turns.length - 1].prompt : "Hello"), Number(settings.seed) || 0, true);
    return html`
      <header class="bar"><${wisp.Brand} title="playground" /><span class="grow"></span>
        <span data-testid="model">${verifier.model || "no model yet"}</span>
        ${status && html`<span class="chip ${verifier.connected ? "good" : "warn"}">${verifier.connected ? "connected" : "no verifier"}</span>`}
        ${verifier.mode && html`<span class="chip" title="exact: the text never depends on batching">${verifier.mode}</span>`}
      </header>
      <main class="page">
        <div class="chat">
          <${Trouble} status=${status} trouble=${trouble} />
          ${turns.length > 0 && html`<${view.Legend} />`}
          <div class="turns" aria-live="off">
            ${turns.map((turn, i) => html`<${Turn} key=${i} turn=${turn} reasons=${status ? status.reasons : {}} mode=${verifier.mode}
              again=${i === turns.length - 1 && !running.current ? () => send(turns.slice(0, -1), turn.prompt, turn.beside) : null} />`)}
          </div>
          ${!turns.length && html`<p class="empty">Nothing was asked yet. Answers show which tokens this device drafted, and which the verifier wrote.</p>`}
          <${Compose} running=${Boolean(running.current)} ready=${ready} send=${(text, beside) => send(turns, text, beside)} stop=${() => running.current && running.current.abort()}
            clear=${turns.length ? () => setTurns([]) : null} />
        </div>
        <aside class="side" aria-label="Settings and state">
          <${side.State} status=${status} />
          <${side.Settings} settings=${settings} set=${set} />
          <${side.Code} request=${verifier.model && side.valid(settings) ? request : null} />
        </aside>
      </main>`;
  }

  render(html`<${Page} />`, document.getElementById("page"));
})();
