// What both pages share: requests with a key in a header, streams read with fetch, numbers, the form that asks for a key.
"use strict";
window.wisp = (() => {
  const { html, useState } = window.htmPreact;
  const KEY = "wisp-key";
  let key = "";
  try {
    key = sessionStorage.getItem(KEY) || "";
  } catch {
    // a page opened from a file may have no storage
  }

  function useKey(given, keep) {
    key = given;
    try {
      if (keep) sessionStorage.setItem(KEY, given);
      else sessionStorage.removeItem(KEY);
    } catch {
      // then it is kept in memory alone
    }
  }

  class Failed extends Error {
    constructor(status, message, code) {
      super(message);
      this.status = status;
      this.code = code || "";
    }
    get wantsKey() {
      return this.status === 401 || this.status === 403;
    }
  }

  async function ask(path, { body, method, signal } = {}) {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, {
        method: method || (body === undefined ? "GET" : "POST"),
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failed(0, "This process does not answer. It may have ended.");
    }
    if (answer.ok) return answer;
    let said = {};
    try {
      said = (await answer.json()).error || {};
    } catch {
      // not one of ours
    }
    throw new Failed(answer.status, said.message || `HTTP ${answer.status}`, said.code);
  }

  // The data of server-sent events, as they come. Ends with the stream, and throws where it breaks.
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let got;
      try {
        got = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Failed(0, "The connection broke off.");
      }
      if (got.done) return;
      const blocks = (rest + got.value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  }

  // Follows /v1/status for as long as the page lives. `heard` gets snapshots, `failed` what is in the way (null: nothing).
  async function follow(heard, failed) {
    let wait = 250;
    for (;;) {
      try {
        const answer = await ask("/v1/status/events");
        for await (const data of events(answer)) {
          wait = 250;
          failed(null);
          heard(JSON.parse(data));
        }
        failed(new Failed(0, "The process closed its stream; it may be stopping."));
      } catch (error) {
        failed(error);
        if (error.wantsKey) return; // until there is another key
      }
      await new Promise((later) => setTimeout(later, wait));
      wait = Math.min(wait * 2, 4000);
    }
  }

  const number = (value, digits = 0) =>
    value === null || value === undefined || !Number.isFinite(value)
      ? "–"
      : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const percent = (value, digits = 0) => (Number.isFinite(value) && value !== null ? `${number(value * 100, value < 1 ? digits : 0)}\u00a0%` : "–");

  function KeyForm({ error, given }) {
    const [text, setText] = useState("");
    const [keep, setKeep] = useState(false);
    const submit = (event) => {
      event.preventDefault();
      useKey(text.trim(), keep);
      given();
    };
    const refused = error.status === 403 || (key && error.status === 401);
    return html`<form class="card key" onSubmit=${submit} aria-labelledby="key-title">
      <h2 id="key-title">This server asks for an API key</h2>
      ${refused && html`<p class="note bad" role="alert">${error.message}</p>`}
      <div>
        <label for="key">API key</label>
        <input id="key" type="password" autocomplete="off" required value=${text} onInput=${(e) => setText(e.target.value)} />
      </div>
      <label class="check"><input type="checkbox" checked=${keep} onChange=${(e) => setKeep(e.target.checked)} /> Keep it until this tab is closed</label>
      <p class="soft small">It is sent in a header, to this server alone, and never becomes part of an address.</p>
      <div><button class="main">Continue</button></div>
    </form>`;
  }

  const Brand = ({ title }) => html`<div class="brand"><img src="/assets/icon.svg" alt="" /><h1>WISP <span class="soft">${title}</span></h1></div>`;

  return { Failed, ask, events, follow, number, percent, KeyForm, Brand };
})();
