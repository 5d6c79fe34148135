// One answer as it comes: tokens with their origins, rounds, and the figures that stay.
"use strict";
wisp.generation = (() => {
  // The body of a request. `draft` false: the target alone.
  function body(settings, messages, seed, draft) {
    const sent = { model: settings.model, messages, seed, stream: true, stream_options: { include_usage: true } };
    for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens"]) {
      if (settings[name] !== "") sent[name] = Number(settings[name]);
    }
    if (settings.ignore_eos) sent.ignore_eos = true;
    if (settings.tools.trim()) sent.tools = JSON.parse(settings.tools);
    if (settings.schema.trim()) {
      sent.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
    }
    if (settings.logprobs) Object.assign(sent, { logprobs: true, top_logprobs: 5 });
    return { ...sent, wisp: draft ? { rounds: true } : { rounds: true, draft: false } };
  }

  const fresh = (draft) => ({
    draft, text: "", tokens: [], rounds: [], calls: [], logprobs: [], started: performance.now(), first: 0, last: 0, finish: "", error: null,
    usage: null, metrics: null, running: true,
  });

  function take(answer, chunk) {
    if (chunk.error) throw new wisp.Failed(0, chunk.error.message, chunk.error.code);
    const choice = (chunk.choices || [])[0];
    const now = performance.now();
    if (choice) {
      const delta = choice.delta || {};
      if (delta.content) answer.text += delta.content;
      if (delta.tool_calls) calls(answer, delta.tool_calls);
      if (choice.logprobs && choice.logprobs.content) answer.logprobs.push(...choice.logprobs.content);
      if (choice.finish_reason) answer.finish = choice.finish_reason;
    }
    if (chunk.wisp) {
      const { tokens, round } = chunk.wisp;
      for (const token of tokens) answer.tokens.push({ ...token, round: answer.rounds.length });
      if (round) answer.rounds.push(round);
      if (tokens.length) {
        answer.first = answer.first || now;
        answer.last = now;
      }
    }
    if (chunk.usage) answer.usage = chunk.usage;
    if (chunk.metrics) answer.metrics = chunk.metrics;
  }

  function calls(answer, parts) {
    for (const part of parts) {
      const call = (answer.calls[part.index || 0] ||= { name: "", arguments: "" });
      if (part.function && part.function.name) call.name = part.function.name;
      if (part.function && part.function.arguments) call.arguments += part.function.arguments;
    }
  }

  // Runs one request into `answer`; `changed` is called after every event.
  async function run(answer, request, signal, changed) {
    try {
      const reply = await wisp.ask("/v1/chat/completions", { body: request, signal });
      for await (const data of wisp.events(reply)) {
        if (data === "[DONE]") break;
        take(answer, JSON.parse(data));
        changed();
      }
      if (!answer.finish) throw new wisp.Failed(0, "The answer broke off.");
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.error = error;
    }
    answer.running = false;
    changed();
  }

  function figures(answer) {
    const n = answer.usage ? answer.usage.completion_tokens : answer.tokens.length;
    const spec = answer.metrics && answer.metrics.speculative_decoding;
    const drafted = spec ? spec.num_draft_tokens : sum(answer.rounds, "drafted");
    const accepted = spec ? spec.num_accepted_draft_tokens : sum(answer.rounds, "accepted");
    const drafts = spec ? spec.num_spec_steps : answer.rounds.filter((r) => r.drafted).length;
    // By the edge's clock where it tells: a browser that was busy gets several rounds at once.
    const told = answer.rounds.length > 1 ? answer.rounds.at(-1).at_ms - answer.rounds[0].at_ms : 0;
    const seconds = (told || answer.last - answer.first) / 1e3;
    const steps = sum(answer.rounds, "steps");
    return {
      n, drafted, accepted, drafts, steps,
      speed: n > 1 && seconds > 0 ? (n - 1) / seconds : NaN,
      ttft: answer.first ? answer.first - answer.started : NaN,
      acceptance: drafted ? accepted / drafted : NaN,
      length: drafts ? drafted / drafts : NaN,
      stepsPerToken: n ? steps / n : NaN,
    };
  }

  const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] || 0), 0);

  // Where two answers part: null if nowhere, else the place, both texts from there, and how close the target's scores are.
  function difference(one, other) {
    const a = one.tokens, b = other.tokens;
    let at = 0;
    while (at < a.length && at < b.length && a[at].id === b[at].id) at += 1;
    if (at === a.length && at === b.length && one.text === other.text && one.finish === other.finish) return null;
    const rest = (tokens) => tokens.slice(at, at + 8).map((t) => t.text).join("");
    return { at, before: a.slice(Math.max(0, at - 12), at).map((t) => t.text).join(""), one: rest(a), other: rest(b), gap: gap(one, other, at) };
  }

  // The difference of the target's log probabilities for the two tokens at `at`; NaN if it is not known.
  function gap(one, other, at) {
    const mine = one.logprobs[at], theirs = other.logprobs[at];
    if (!mine || !theirs) return NaN;
    const same = mine.top_logprobs.find((t) => t.token === theirs.token);
    return same ? mine.logprob - same.logprob : NaN;
  }

  return { body, fresh, run, figures, difference, sum };
})();
