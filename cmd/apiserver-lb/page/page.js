"use strict";
// What comes from the balancer is put in as text, never as HTML: names and messages in it
// are those of others.
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// make makes an element with attributes and children, which are elements or text.
function make(name, attributes, ...children) {
  const e = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v);
  e.append(...children.map((c) => (c instanceof Node ? c : String(c))));
  return e;
}

// show puts text in where it has changed, so that a screen reader hears only what is new.
function show(e, text) { if (e.textContent !== text) e.textContent = text; }

// fill gives an element new children. Nodes that stay what they are stay where they are:
// who reads one with a screen reader, or has marked its text, keeps the place.
function fill(e, ...children) {
  const fresh = e.cloneNode(false);
  fresh.append(...children);
  patch(e, fresh);
}

// patch makes a node like a fresh one.
function patch(old, fresh) {
  if (old.nodeName !== fresh.nodeName) { old.replaceWith(fresh); return; }
  if (old.nodeType === Node.TEXT_NODE) { if (old.data !== fresh.data) old.data = fresh.data; return; }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const was = [...old.childNodes];
  const now = [...fresh.childNodes];
  now.forEach((n, i) => (was[i] ? patch(was[i], n) : old.append(n)));
  was.slice(now.length).forEach((n) => n.remove());
}

const two = (n) => String(n).padStart(2, "0");
function clock(at) { const t = new Date(at); return `${two(t.getUTCHours())}:${two(t.getUTCMinutes())}:${two(t.getUTCSeconds())}`; }
function day(at) { return new Date(at).toISOString().slice(0, 10); }

// span writes a time in seconds in its two largest units.
function span(s) {
  s = Math.max(0, Math.floor(s));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${s % 60}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h${Math.floor(s % 3600 / 60)}m`;
  return `${Math.floor(s / 86400)}d${Math.floor(s % 86400 / 3600)}h`;
}
function between(from, to) { return (new Date(to) - new Date(from)) / 1000; }
function millis(s) { return s > 0 ? `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms` : "–"; }
function rate(n) { return n.toFixed(n < 10 ? 1 : 0); }
function total(counts) { return Object.values(counts || {}).reduce((a, b) => a + b, 0); }

// rows fills a table; a cell is text, or [text, class]. The heads are repeated in the cells
// for narrow screens.
function rows(id, list, none) {
  const table = $(id);
  const heads = [...table.tHead.rows[0].cells];
  const body = make("tbody");
  for (const cells of list) {
    body.append(make("tr", {}, ...cells.map((c, i) => {
      const [text, kind] = Array.isArray(c) ? c : [c, ""];
      return make("td", { "data-head": heads[i].textContent, class: [heads[i].className, kind].join(" ").trim() }, text);
    })));
  }
  if (list.length === 0) body.append(make("tr", {}, make("td", { colspan: heads.length, "data-head": "" }, none)));
  patch(table.tBodies[0], body);
}

const words = { r: "ready", o: "drained by an operator", d: "draining", x: "dead", u: "not judged" };

// strip draws the states of the last hour.
function strip(h, history) {
  const states = h ? h.states : "";
  const from = history.points - states.length;
  const lasted = {};
  const svg = make("svg:svg", { class: "strip", viewBox: `0 0 ${history.points} 1`, preserveAspectRatio: "none", role: "img" });
  for (let i = 0; i < states.length;) {
    let k = i;
    while (k < states.length && states[k] === states[i]) k++;
    svg.append(make("svg:rect", { class: states[i], x: from + i, y: 0, width: k - i, height: 1 }));
    lasted[states[i]] = (lasted[states[i]] || 0) + (k - i) * history.everySeconds;
    i = k;
  }
  const text = Object.entries(lasted).map(([s, t]) => `${words[s]} for ${span(t)}`).join(", ") || "nothing is known yet";
  svg.setAttribute("aria-label", `The last hour: ${text}`);
  return [svg, text];
}

// wave draws values of the last hour.
function wave(values, history, name, write) {
  values = values || [];
  const most = Math.max(0, ...values);
  const from = history.points - values.length;
  const y = (v) => (most > 0 ? 22 - 20 * v / most : 22).toFixed(1);
  const path = values.map((v, i) => `${i ? "L" : "M"}${from + i} ${y(v)}`).join("");
  const text = values.length ? `now ${write(values[values.length - 1])}, at most ${write(most)}` : "nothing is known yet";
  return [make("svg:svg", { viewBox: `0 0 ${history.points} 24`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}, the last hour: ${text}` },
    make("svg:path", { d: path ? path + "h.01" : "M0 22" })), text];
}

function figure(name, [svg, text], kind) {
  return make("div", kind ? { class: kind } : {}, make("p", { class: "soft" }, `${name}: ${text}`), svg);
}

let told = ""; // what a screen reader has said
let state, history = { points: 240, everySeconds: 15, backends: {} };

function draw() {
  const s = state;
  document.title = `${s.summary.some((r) => r.level === "bad") ? "✖ " : s.summary.some((r) => r.level === "warn") ? "! " : ""}apiserver-lb ${s.host}`;
  show($("host"), `on ${s.host}`);
  show($("about"), `${s.version}, up for ${span(between(s.since, s.at))}, ${s.ready ? "ready for clients" : "not ready for clients"}`);
  const mark = { ok: "✔ ", warn: "! ", bad: "✖ " };
  fill($("summary"), ...s.summary.map((r) => make("li", { class: r.level }, make("b", { "aria-hidden": "true" }, mark[r.level] || ""), r.text)));
  // A screen reader says what is new. Ages and counts change all the time, and are no news.
  const said = s.summary.map((r) => r.text.replace(/ \((?:\d+[dhms])+\)/g, "")).join(" ");
  const news = said.replace(/\d+[dhms]?/g, "");
  if (news !== told) {
    told = news;
    show($("news"), said);
  }
  const facts = [["Requests per second", rate(s.backends.reduce((n, b) => n + b.requestsPerSecond, 0))], ["Connections of clients", s.clientConnections],
    ["Short requests in flight", s.inFlight.short], ["Watches and other long ones", s.inFlight.long], ["Tunnels", s.inFlight.upgrade]];
  fill($("totals"), ...facts.map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, v))));

  fill($("backends"), ...s.backends.map((b) => {
    const h = history.backends[b.name];
    const drained = b.drained ? ", drained by an operator" : "";
    const facts = [["Requests per second", rate(b.requestsPerSecond)], ["Half within", millis(b.p50Seconds)], ["99 of 100 within", millis(b.p99Seconds)],
      ["Short", b.short], ["Watches and other long", b.long], ["Clients at home", b.homed], ["5xx, last minute", b.failedLastMinute], ["Sent on, since the start", total(b.retries)]];
    const f = b.lastFailure;
    const failure = f ? `Last failed check: ${f.verdict.replaceAll("_", " ")}${f.failed ? ` (${f.failed.join(", ")})` : ""}, ${span(between(f.at, s.at))} ago${f.error ? `: ${f.error}` : ""}` : "No check has failed";
    return make("article", { "aria-labelledby": `b-${b.name}` },
      make("header", {}, make("h3", { id: `b-${b.name}` }, b.name), make("span", { class: `state ${b.drained ? "drained" : b.state}` }, b.state + drained),
        make("span", { class: "soft" }, `${b.since ? `for ${span(between(b.since, s.at))}, ` : ""}${b.address}${b.zone ? `, zone ${b.zone}` : ""}, weight ${b.weight}`)),
      make("dl", {}, ...facts.map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, v)))),
      make("div", { class: "waves" }, figure("Last hour", strip(h, history), "wide"),
        figure("Requests per second", wave(h && h.rate, history, `Requests per second of ${b.name}`, rate)),
        figure("99 of 100 within", wave(h && h.p99, history, `Latency of ${b.name}`, millis))),
      make("p", { class: "soft" }, failure));
  }));

  rows("changes", (s.changes || []).map((c) => [clock(c.at), c.backend, c.from, c.to, [c.verdict.replaceAll("_", " "), c.failed ? `(${c.failed.join(", ")})` : "", c.error || ""].filter(Boolean).join(" ")]), "None since the start.");
  const counts = (all, minute) => Object.keys(all).filter((k) => all[k]).sort().map((k) => [k.replaceAll("_", " "), minute[k] || 0, all[k]]);
  rows("retries", counts(s.retries, s.lastMinute.retries), "None.");
  rows("refusals", counts(s.refusals, s.lastMinute.refusals), "None.");
  const expiry = (at) => { const left = between(s.at, at); return [left <= 0 ? "EXPIRED" : span(left), left <= 0 ? "bad" : left < 14 * 86400 ? "warn" : ""]; };
  rows("certificates", s.certificates.map((c) => [c.use, day(c.notAfter), expiry(c.notAfter), c.subject, c.file]), "None.");
  rows("users", (s.clientCertificates || []).map((c) => [c.user, c.serial, day(c.notAfter), expiry(c.notAfter), c.connections]), "None at the moment.");
  $("more-users").hidden = !s.moreClientCertificates;
  show($("more-users"), s.moreClientCertificates ? `and ${s.moreClientCertificates} more` : "");
}

let heard = 0; // when something last came
function live() {
  const e = $("live");
  const silent = (Date.now() - heard) / 1000;
  const fresh = heard > 0 && silent < 10;
  e.className = fresh ? "fresh" : heard ? "lost" : "";
  show(e, fresh ? "live" : heard ? `the balancer has not been heard of since ${clock(heard)} UTC; what stands below is of then` : "connecting");
}

const events = new EventSource("status/events");
events.addEventListener("history", (e) => { history = JSON.parse(e.data); if (state) draw(); });
events.addEventListener("state", (e) => { state = JSON.parse(e.data); heard = Date.now(); draw(); live(); });
setInterval(live, 1000);
