// The chat page. Conversations are stored in this browser; answers come from /v1/chat/completions on the same origin.
// Text becomes DOM nodes by textContent, or by marked and DOMPurify. The page's policy forbids every other way.
"use strict";

const $ = (id) => document.getElementById(id);

/** Make an element with these properties and children. Null children are left out. */
function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function button(label, onclick, properties = {}) {
  return h("button", { type: "button", className: "quiet", onclick, ...properties }, label);
}

// ---- Storage --------------------------------------------------------------------------------------------------------
// A conversation is {id, title, updated, messages}. Each has its own key, so that two tabs do not overwrite each other.
// A message is {role: "user", text} or {role: "assistant", parts: [{type: text|python|python_output, text}], model,
// first_token_s, tokens, tokens_per_s, finish, stopped, error: {text, detail}}.

const PREFIX = "nanochat-ray/conversation/";
const SETTINGS = "nanochat-ray/settings";
const API_KEY = "nanochat-ray/api-key";
const conversations = new Map();
const running = new Map(); // conversation id -> AbortController of its answer
const settings = { model: null, system: "", temperature: 0.6, top_k: 50, max_tokens: null };
let current = null; // the conversation on screen

function load() {
  for (const key of Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))) read(localStorage.getItem(key));
  try {
    Object.assign(settings, JSON.parse(localStorage.getItem(SETTINGS)));
  } catch {
    localStorage.removeItem(SETTINGS);
  }
}

function read(json) {
  try {
    const conversation = JSON.parse(json);
    if (Array.isArray(conversation.messages)) conversations.set(conversation.id, conversation);
  } catch {
    // Ignore the value: other code wrote it.
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    notice("This browser’s storage is full or switched off, so nothing new is kept. Deleting conversations makes room.");
  }
}

function save(conversation) {
  if (conversations.has(conversation.id)) write(PREFIX + conversation.id, conversation);
}

function fresh() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(36)).join("");
  return { id, title: "", updated: 0, messages: [] };
}

function forget(conversation) {
  running.get(conversation.id)?.abort();
  conversations.delete(conversation.id);
  localStorage.removeItem(PREFIX + conversation.id);
}

// ---- Text to nodes --------------------------------------------------------------------------------------------------

marked.use({
  breaks: true, // keep single line breaks
  tokenizer: {
    // Show HTML tags as text.
    html() {},
    tag() {},
    del: (source) => (source.startsWith("~~") ? false : undefined), // a single tilde means "about"
  },
  renderer: {
    // Show images as links: the address of an image could send the conversation to another site.
    image: ({ href, text }) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
    checkbox: ({ checked }) => `<span class="task">${checked ? "☑" : "☐"}</span> `,
  },
});

const SAFE = {
  ALLOWED_TAGS: "p br strong em del a code pre span ul ol li blockquote h1 h2 h3 h4 h5 h6 hr table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** Return the Markdown of an unfinished answer. Marks at its end are escaped if more text may change their meaning. For
 * example, a last line "-" does not yet make the line above a heading. */
function unfinished(text) {
  const lines = text.split("\n");
  let fence = null;
  for (const line of lines) {
    const [, marks, rest] = line.match(/^\s*(?:(?:[-*+>]|\d+[.)])\s+)*(`{3,}|~{3,})(.*)$/) ?? [];
    if (fence === null) fence = marks && !(marks[0] === "`" && rest.includes("`")) ? marks : null;
    else if (marks?.startsWith(fence) && !rest.trim()) fence = null;
  }
  if (fence !== null) return text;
  const last = lines.pop();
  const undecided = /[\p{L}\p{N}]/u.test(last) && !/^\s*\d+[.)]\s*$/.test(last) ? /[*_~[\]!<&]+$/ : /.+/;
  const escape = (marks) => marks.replace(/[!-/:-@[-`{-~]/g, "\\$&");
  return [...lines, last.replace(undecided, escape)].join("\n");
}

/** Show an answer's parts in an element. Blocks that did not change since the last call keep their nodes. */
function renderParts(element, parts, goesOn = false) {
  const [text, calls] = joinParts(parts);
  const blocks = marked.lexer(goesOn ? unfinished(text) : text);
  const raws = blocks.map((block) => block.raw.replace(MARK, (_, i) => JSON.stringify(calls[i] ?? null)));
  let same = 0;
  while (same < blocks.length && element.children[same]?.raw === raws[same]) same++;
  while (element.children.length > same) element.lastChild.remove();
  for (let i = same; i < blocks.length; i++) {
    const html = marked.parser(Object.assign([blocks[i]], { links: blocks.links }));
    const block = h("div", { className: "block", raw: raws[i] }, DOMPurify.sanitize(html, SAFE));
    for (const link of block.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
    for (const pre of block.querySelectorAll("pre")) decorateCode(pre);
    placeCalls(block, calls);
    element.append(block);
  }
}

// A tool call can be in the middle of a sentence. So it passes through Markdown as a mark: its number between two
// characters of the private use area. joinParts replaces these characters in text.
const MARK = /\uE000(\d+)\uE001/g;

function joinParts(parts) {
  const calls = [];
  let text = "";
  for (const part of parts) {
    if (part.type === "text") {
      text += part.text.replace(/[\uE000\uE001]/g, "\uFFFD");
    } else if (part.type === "python_output" && calls.length && calls.at(-1).result === null) {
      calls.at(-1).result = part.text;
    } else {
      text += `\uE000${calls.length}\uE001`;
      calls.push(part.type === "python" ? { code: part.text, result: null } : { code: "", result: part.text });
    }
  }
  return [text, calls];
}

function placeCalls(block, calls) {
  const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (walker.currentNode.data.includes("\uE000")) texts.push(walker.currentNode);
  for (const node of texts) {
    const pieces = node.data.split(MARK); // text, number, text, number, ..., text
    node.replaceWith(...pieces.map((piece, i) => (i % 2 ? toolCall(calls[piece]) : piece)));
  }
}

function toolCall({ code, result }) {
  return h(
    "span",
    { className: "tool" },
    h("span", { className: "tool-name" }, "calculator"),
    h("code", {}, code),
    h("span", { className: "arrow", ariaHidden: "true" }, "→"),
    h("span", { className: "unseen" }, result === null ? " has no result" : " gives "),
    h("code", { className: "result" }, result ?? "…"),
  );
}

function decorateCode(pre) {
  const code = pre.querySelector("code");
  const language = code?.className.match(/^language-([\w+#.-]+)/)?.[1] ?? "";
  const bar = h("div", { className: "code-bar" }, h("span", {}, language));
  bar.append(copyButton("Copy code", () => pre.textContent));
  const frame = h("div", { className: "code" });
  pre.replaceWith(frame);
  frame.append(bar, pre);
  pre.tabIndex = 0; // a long line is scrolled with the arrow keys
}

/** Return an answer as plain text. If `spoken`, tool calls are described in words, for screen readers. */
function plainText(parts, spoken = false) {
  const [text, calls] = joinParts(parts);
  const said = (i) => (spoken && calls[i] ? `calculator: ${calls[i].code} gives ${calls[i].result ?? "nothing"}. ` : "");
  return text.replace(MARK, (_, i) => said(i));
}

// ---- The service ----------------------------------------------------------------------------------------------------

class ServiceError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? "");
    Object.assign(this, { status, code: error?.code, retryAfter });
  }
}

/** Return a response of the service. Throws ServiceError for an error status, TypeError if there is no response. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem(API_KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServiceError(response.status, body?.error, secondsOf(response.headers.get("Retry-After")));
}

/** Return the seconds of a Retry-After header, in either of its two forms. Returns null without one. */
function secondsOf(header) {
  if (header === null) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isNaN(seconds) ? null : Math.max(0, Math.ceil(seconds));
}

async function* serverSentEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // stop the service from sending the rest
  }
}

/** Return the conversation for the API. Turns must alternate, so questions without an answer are joined. */
function requestMessages(conversation) {
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const message of conversation.messages) {
    if (message.role === "user" && messages.at(-1)?.role === "user") {
      messages.at(-1).content += `\n\n${message.text}`;
    } else if (message.role === "user") {
      messages.push({ role: "user", content: message.text });
    } else if (message.parts.length) {
      const plain = message.parts.every((part) => part.type === "text");
      messages.push({ role: "assistant", content: plain ? plainText(message.parts) : message.parts });
    }
  }
  return messages;
}

const PATIENCE = { attempts: 3, seconds: 60 }; // limits of retries and of the wait before each

/** Return the response and the time of the request. Retries if the service is busy: `waiting` gets the seconds left. */
async function requestAnswer(body, signal, waiting) {
  for (let attempt = 1; ; attempt++) {
    const sent = performance.now();
    try {
      return [await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal }), sent];
    } catch (error) {
      const busy = [429, 503].includes(error.status) && error.retryAfter !== null;
      if (!busy || error.retryAfter > PATIENCE.seconds || attempt > PATIENCE.attempts) throw error;
      for (let seconds = Math.max(1, error.retryAfter); seconds > 0; seconds--) {
        waiting(seconds);
        await sleep(1000, signal);
      }
      waiting(0);
    }
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** Fill `message` with the answer as it streams. `changed` is called after every change. */
async function streamAnswer(conversation, message, signal, changed) {
  const body = {
    ...(settings.model && { model: settings.model }),
    messages: requestMessages(conversation),
    temperature: settings.temperature,
    ...(settings.top_k && { top_k: settings.top_k }),
    ...(settings.max_tokens && { max_tokens: settings.max_tokens }),
    stream: true,
    stream_options: { include_usage: true },
  };
  const [response, sent] = await requestAnswer(body, signal, (seconds) => changed(seconds));
  let first = null;
  let last = null;
  let done = false;
  for await (const data of serverSentEvents(response)) {
    done ||= data === "[DONE]";
    if (done) continue;
    const event = JSON.parse(data);
    if (event.error) throw new ServiceError(null, event.error);
    const choice = event.choices[0];
    const text = choice?.delta?.nanochat_text ?? choice?.delta?.content;
    if (text) {
      last = performance.now();
      first ??= last;
      message.first_token_s = (first - sent) / 1000;
      addText(message.parts, choice.delta.nanochat_part ?? "text", text);
      changed();
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (event.usage) {
      message.tokens = event.usage.completion_tokens;
      if (last > first) message.tokens_per_s = ((message.tokens - 1) * 1000) / (last - first);
    }
  }
  if (!done) throw new TypeError("the stream ended early");
}

function addText(parts, type, text) {
  if (parts.at(-1)?.type === type) parts.at(-1).text += text;
  else parts.push({ type, text });
}

/** Return an error in plain words, and the service's message. `begun`: a part of the answer has arrived. */
function explain(error, begun) {
  const detail = error instanceof ServiceError ? error.message : "";
  const say = (text) => ({ text, detail });
  if (error instanceof SyntaxError) return say("The service sent something this page does not understand.");
  if (!(error instanceof ServiceError)) {
    if (begun) return say("The connection broke before the answer was complete.");
    return say("The service can’t be reached. Is it running, and are you online?");
  }
  const { status, code, retryAfter } = error;
  if (status === 401) return say("The service asks for a valid API key. You can enter it in the settings.");
  if (status === 403) return say("The service does not answer this page.");
  if (status === 404) return say("The service does not have this model. Choose another one.");
  if (status === 413 || code === "context_length_exceeded")
    return say("This conversation is longer than the model can read. Start a new one, or shorten an earlier message.");
  if (status === 429 || status === 503)
    return say(`The service is busy. Please try again ${retryAfter ? `in ${retryAfter} s` : "in a moment"}.`);
  if (status === 400 || status === 422) return say("The service did not accept this request.");
  if (status === null) return say("The service failed while it was answering.");
  return say(`The service failed on this request (error ${status}).`);
}

// ---- Actions --------------------------------------------------------------------------------------------------------

function ask(conversation, text) {
  if (running.has(conversation.id) || !text.trim()) return;
  conversation.messages.push({ role: "user", text });
  conversation.title ||= text.trim().split("\n")[0].slice(0, 80);
  conversations.set(conversation.id, conversation);
  history.replaceState(null, "", `#c=${conversation.id}`);
  answer(conversation);
}

/** Remove the message at `index` and all after it. Then ask `text`, or answer the remaining question again. */
function askAgain(conversation, index, text = null) {
  if (running.has(conversation.id)) return;
  conversation.messages.splice(index);
  if (index === 0) conversation.title = "";
  if (text === null) answer(conversation);
  else ask(conversation, text);
  if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); // the pressed button was removed
}

async function answer(conversation) {
  const message = { role: "assistant", parts: [], model: settings.model };
  const controller = new AbortController();
  conversation.messages.push(message);
  conversation.updated = Date.now();
  running.set(conversation.id, controller);
  save(conversation);
  if (conversation === current) showThread();
  showConversations();
  announce("Answering");
  try {
    await streamAnswer(conversation, message, controller.signal, (waiting) => redraw(message, waiting));
  } catch (error) {
    if (controller.signal.aborted) message.stopped = true;
    else message.error = explain(error, message.parts.length > 0);
  }
  running.delete(conversation.id);
  save(conversation);
  if (conversation === current) {
    drawMessage(message);
    showRunning();
    if (!message.error) announce(message.stopped ? "Stopped" : plainText(message.parts, true));
  }
}

function announce(text) {
  $("announcer").textContent = text;
}

async function confirmed(question) {
  $("confirm-question").textContent = question;
  $("confirm").returnValue = "cancel";
  $("confirm").showModal();
  await new Promise((resolve) => $("confirm").addEventListener("close", resolve, { once: true }));
  return $("confirm").returnValue === "delete";
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea", { value: text, className: "unseen" }); // plain HTTP on a network has no clipboard object
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

function copyButton(label, text) {
  const element = button("Copy", async () => {
    await copy(text());
    element.textContent = "Copied";
    setTimeout(() => (element.textContent = "Copy"), 1500);
  });
  element.ariaLabel = label;
  return element;
}

// ---- Display --------------------------------------------------------------------------------------------------------

const drawn = new WeakMap(); // message -> its view, while its conversation is on screen

function showThread() {
  $("thread").replaceChildren(...current.messages.map(messageElement));
  $("welcome").hidden = current.messages.length > 0;
  document.title = current.title ? `${current.title} · nanochat-ray` : "nanochat-ray";
  showRunning();
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

/** Update the buttons that depend on whether this conversation is being answered. */
function showRunning() {
  const busy = running.has(current.id);
  const focused = document.activeElement;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  for (const element of $("thread").querySelectorAll(".when-idle")) element.disabled = busy;
  if ([$("send"), $("stop")].includes(focused) && focused.hidden) $("question").focus();
}

function messageElement(message, index) {
  const conversation = current;
  const article = h("article", { className: `message ${message.role}` });
  article.append(h("h2", { className: "unseen" }, message.role === "user" ? "You" : "Answer"));
  if (message.role === "user") {
    const edit = button("Edit", () => editMessage(article, message, index), { className: "quiet when-idle", ariaLabel: "Edit message" });
    const actions = h("div", { className: "actions" }, copyButton("Copy message", () => message.text), edit);
    article.append(h("div", { className: "bubble" }, message.text), actions);
    return article;
  }
  const again = index === conversation.messages.length - 1 ? () => askAgain(conversation, index) : null;
  const note = h("div", { className: "note" });
  const footer = h("div", { className: "footer" });
  article.append(h("div", { className: "body" }), note, footer);
  drawn.set(message, { article, again });
  drawMessage(message);
  return article;
}

/** Draw at the next frame, because many tokens may arrive within one. */
function redraw(message, waiting) {
  const view = drawn.get(message);
  if (!view) return;
  view.waiting = waiting;
  view.frame ??= requestAnimationFrame(() => drawMessage(message));
}

function drawMessage(message) {
  const view = drawn.get(message);
  if (!view) return;
  if (view.frame) cancelAnimationFrame(view.frame);
  view.frame = null;
  const busy = running.has(current.id) && current.messages.at(-1) === message;
  const scroller = $("scroller");
  const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  const [body, note, footer] = ["body", "note", "footer"].map((name) => view.article.querySelector(`.${name}`));
  view.article.ariaBusy = busy;
  view.article.classList.toggle("thinking", busy && !message.parts.length && !view.waiting);
  renderParts(body, busy ? revealed(view, message.parts) : message.parts, busy);
  note.replaceChildren(...noteOf(message, view, busy));
  footer.replaceChildren(...(busy ? [] : footerOf(message, view)));
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  if (busy && view.shown < view.length) redraw(message, view.waiting);
}

const LONGEST_LAG = 400; // milliseconds: the longest time to show text that arrived together

/** Return the beginning of an answer to show at this frame. A busy service sends many words at once, a few times a
 * second. They appear at an even pace, over the time that passed since the words before them arrived. */
function revealed(view, parts) {
  const now = performance.now();
  const length = parts.reduce((sum, part) => sum + part.text.length, 0);
  if (!length) return parts;
  if (length !== view.length) {
    const lag = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : Math.min(now - view.came, LONGEST_LAG);
    view.pace = lag > 0 ? (length - view.shown) / lag : Infinity; // show the first words, whose lag is NaN, at once
    Object.assign(view, { length, came: now, framed: now });
  }
  view.shown = view.pace === Infinity ? length : Math.min(length, view.shown + view.pace * (now - view.framed));
  view.framed = now;
  let rest = Math.floor(view.shown);
  return parts.flatMap((part) => {
    const text = part.text.slice(0, Math.max(0, rest)).replace(/[\uD800-\uDBFF]$/, ""); // drop half a character
    rest -= part.text.length;
    return text ? [{ ...part, text }] : [];
  });
}

function noteOf(message, view, busy) {
  if (busy) return view.waiting ? [h("p", { className: "waiting" }, `The service is busy. Trying again in ${view.waiting} s.`)] : [];
  if (!message.error) return [];
  const detail = message.error.detail ? h("p", { className: "detail" }, message.error.detail) : null;
  const retry = view.again ? button("Try again", view.again, { className: "when-idle" }) : null;
  return [h("div", { className: "error", role: "alert" }, h("p", {}, message.error.text), detail, retry)];
}

function footerOf(message, view) {
  const stats = [
    message.stopped && "stopped",
    message.finish === "length" && "cut off at the token limit",
    message.first_token_s !== undefined && `${message.first_token_s.toFixed(2)} s to first token`,
    message.tokens_per_s && `${message.tokens_per_s.toFixed(message.tokens_per_s < 10 ? 1 : 0)} tokens/s`,
    message.tokens && `${message.tokens} token${message.tokens === 1 ? "" : "s"}`,
    $("model").options.length > 1 && message.model,
  ].filter(Boolean);
  const actions = h("div", { className: "actions" });
  if (message.parts.length) actions.append(copyButton("Copy answer", () => plainText(message.parts)));
  if (view.again && !message.error) actions.append(button("Regenerate", view.again, { className: "quiet when-idle" }));
  return [actions, h("span", { className: "stats" }, stats.join(" · "))];
}

function editMessage(article, message, index) {
  const conversation = current;
  const field = h("textarea", { value: message.text, ariaLabel: "Edit your message" });
  const cancel = () => {
    article.replaceWith(messageElement(message, index));
    $("question").focus();
  };
  const form = h("form", { className: "edit" }, field);
  form.append(h("div", {}, button("Cancel", cancel, { className: "" }), h("button", { className: "primary" }, "Send")));
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value.trim()) askAgain(conversation, index, field.value);
  };
  field.addEventListener("keydown", (event) => event.key === "Escape" && !composing(event) && (event.stopPropagation(), cancel()));
  article.replaceChildren(form);
  typing(field);
  field.focus();
}

/** Return whether a key belongs to an input method. Safari ends the composition before it reports its last key. */
function composing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Make a text field grow with its text. Enter submits its form, except with Shift or from an input method. */
function typing(field) {
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  };
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
  grow();
}

function showConversations() {
  const newestFirst = [...conversations.values()].sort((a, b) => b.updated - a.updated);
  $("conversations").replaceChildren(...newestFirst.map(conversationItem));
  $("delete-all").hidden = conversations.size === 0;
}

function conversationItem(conversation) {
  const link = h("a", { href: `#c=${conversation.id}`, title: conversation.title }, conversation.title);
  if (conversation === current) link.ariaCurrent = "page";
  const cross = { className: "icon", ariaLabel: `Delete conversation: ${conversation.title}` };
  return h("li", {}, link, button("×", () => remove(conversation), cross));
}

async function remove(conversation) {
  if (!(await confirmed(`Delete “${conversation.title}”?`))) return;
  forget(conversation);
  if (conversation === current) location.hash = "#new";
  showConversations();
  $("question").focus();
}

function notice(text, label = null, action = null) {
  $("notice").replaceChildren(text, ...(label ? [button(label, action, { className: "" })] : []));
  $("notice").hidden = !text;
}

/** Show the conversation that the address names. So reload, back and a second tab find it. */
function route() {
  const id = location.hash.match(/^#c=(\w+)$/)?.[1];
  current = conversations.get(id) ?? fresh();
  showThread();
  showConversations();
  showSidebar(false);
}

function showSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  $("menu").ariaExpanded = String(open);
}

// ---- Settings -------------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    const names = data.map((model) => model.id);
    if (!names.includes(settings.model)) settings.model = names[0] ?? null;
    $("model").replaceChildren(...names.map((name) => h("option", { selected: name === settings.model }, name)));
    $("model").hidden = names.length < 2;
    $("only-model").textContent = names.length === 1 ? names[0] : "";
    notice("");
  } catch (error) {
    const { text } = explain(error, false);
    if (error.status === 401) notice(text, "Open settings", openSettings);
    else notice(text, "Try again", loadModels);
  }
}

function openSettings() {
  $("settings").showModal();
}

function startSettings() {
  $("system").value = settings.system;
  for (const name of ["temperature", "top_k", "max_tokens"]) $(name).value = settings[name] ?? "";
  $("api-key").value = sessionStorage.getItem(API_KEY) ?? "";
  const shown = () => ($("temperature-shown").textContent = Number($("temperature").value).toFixed(2));
  shown();
  $("settings").addEventListener("input", (event) => {
    const { id, value, validity } = event.target;
    if (id === "api-key") sessionStorage.setItem(API_KEY, value.trim());
    else if (id === "system") settings.system = value;
    else if (validity.valid) settings[id] = value === "" ? null : Number(value);
    shown();
    write(SETTINGS, settings);
  });
  $("settings").addEventListener("close", loadModels); // the key may have changed
  $("open-settings").onclick = openSettings;
  $("model").onchange = () => {
    settings.model = $("model").value;
    write(SETTINGS, settings);
  };
}

// ---- Start ----------------------------------------------------------------------------------------------------------

function startComposer() {
  const question = $("question");
  typing(question);
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (running.has(current.id) || !question.value.trim()) return;
    const text = question.value;
    question.value = "";
    question.dispatchEvent(new Event("input"));
    ask(current, text);
  };
  $("stop").onclick = () => running.get(current.id)?.abort();
  for (const starter of $("starters").children) starter.onclick = () => ask(current, starter.textContent);
}

function startSidebar() {
  $("menu").onclick = () => showSidebar(!document.body.classList.contains("sidebar-open"));
  $("scrim").onclick = () => showSidebar(false);
  document.querySelector("#sidebar .new").addEventListener("click", () => {
    showSidebar(false);
    $("question").focus();
  });
  $("delete-all").onclick = async () => {
    if (!(await confirmed("Delete all conversations in this browser?"))) return;
    [...conversations.values()].forEach(forget);
    location.hash = "#new";
    showConversations();
    $("question").focus();
  };
}

document.querySelector(".skip").onclick = (event) => {
  event.preventDefault(); // keep the conversation's address
  $("question").focus();
};
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || composing(event) || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("sidebar-open")) showSidebar(false);
  else running.get(current.id)?.abort();
});
addEventListener("hashchange", route);
addEventListener("pagehide", () => {
  for (const id of running.keys()) {
    conversations.get(id).messages.at(-1).stopped = true;
    save(conversations.get(id)); // keep the text so far
  }
});
addEventListener("storage", (event) => {
  // Another tab wrote or deleted a conversation. Ignore this if the conversation is being answered here.
  const id = event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
  if (id === null || running.has(id)) return;
  conversations.delete(id);
  if (event.newValue) read(event.newValue);
  if (id === current.id) route();
  else showConversations();
});

load();
startSettings();
startComposer();
startSidebar();
route();
loadModels();
