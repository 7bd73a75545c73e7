/**
 * What the page knows, and what each message changes in it. Pure: reduce() returns a new state and reads no clock.
 *
 * apply() is the twin of farplug.app.state.apply: the same snapshot and the same event give the same snapshot.
 */

const OF_CONNECTION = ["state", "attempt", "name", "uuid", "ports"];
const OF_ATTACHMENT = ["label", "units", "details", "port", "state", "error", "identity", "speed", "figures", "sources", "questions"];
const OF_FIGURES = ["read", "written", "commands", "rate", "memory", "errors", "endpoints"];
const OF_QUESTION = ["interface", "request", "use", "site", "user", "seconds", "until"];
/** Messages that are kept; of more the oldest go. */
export const MAX_LOG = 500;
/** Seconds of the rates that a chart shows. */
export const CHART_SECONDS = 60;
/** Refusals that are kept; of more the oldest go. */
const MAX_REFUSALS = 16;

/**
 * Return the snapshot after an event.
 *
 * @param {any} snapshot it is not changed
 * @param {any} event the data of an event, with its name as the member `event`
 * @throws {Error} events were dropped: a new snapshot is needed
 */
export function apply(snapshot, event) {
  if (event.id <= snapshot.last_event) return { ...snapshot };
  if (event.event === "events-dropped" || event.event === "dropped") throw new Error("events were dropped; take a new snapshot");
  const guests = { ...snapshot.guests };
  const id = event.guest;
  if (Object.hasOwn(guests, id ?? "") || event.event === "guest") {
    const guest = guestAfter(guests[id] ?? {}, event);
    if (guest === null) delete guests[id];
    else guests[id] = guest;
  }
  return { last_event: event.id, guests };
}

/** @param {any} guest @param {any} event */
function guestAfter(guest, event) {
  switch (event.event) {
    case "guest":
      return {
        id: event.guest, target: event.target, state: "connecting", attempt: null, name: "", uuid: "", ports: [],
        capture: null, attachments: {},
      };
    case "connected":
      return { ...guest, ...pick(event, OF_CONNECTION) };
    case "lost":
    case "reconnecting":
    case "closed":
      return { ...guest, state: event.state, attempt: event.attempt };
    case "port":
      return {
        ...guest,
        ports: guest.ports.map((/** @type {any} */ one, /** @type {number} */ number) =>
          number === event.number ? pick(event, ["name", "state", "error"]) : one),
      };
    case "capture-started":
      return { ...guest, capture: event.path };
    case "capture-ended":
      return { ...guest, capture: null };
    case "guest-removed":
      return null;
  }
  const id = event.attachment;
  if (id === undefined || id === null) return { ...guest };
  const attachments = { ...guest.attachments };
  if (event.event === "attaching") attachments[id] = { id, ...pick(event, OF_ATTACHMENT) };
  else if (event.event === "removed") delete attachments[id];
  else if (Object.hasOwn(attachments, id)) attachments[id] = attachmentAfter(attachments[id], event);
  return { ...guest, attachments };
}

/** @param {any} attachment @param {any} event */
function attachmentAfter(attachment, event) {
  const changed = { ...attachment, state: event.state };
  switch (event.event) {
    case "attached":
      return { ...changed, identity: event.device_name, speed: event.speed, error: null };
    case "opened":
      return { ...changed, port: event.port, error: null };
    case "refused":
    case "detached":
      return { ...changed, error: changed.error ?? event.error, ...("questions" in changed ? { questions: [] } : {}) };
    case "presence-asked":
    case "presence-answered": {
      const others = (changed.questions ?? []).filter((/** @type {any} */ one) => one.interface !== event.interface);
      return { ...changed, questions: event.event === "presence-asked" ? [...others, pick(event, OF_QUESTION)] : others };
    }
    case "figures":
      return { ...changed, figures: pick(event, OF_FIGURES) };
  }
  return changed;
}

/** @param {any} object @param {string[]} names those that are missing are left out */
function pick(object, names) {
  return Object.fromEntries(names.filter((name) => name in object).map((name) => [name, object[name]]));
}

/**
 * @typedef {object} Refusal
 * @property {number} id
 * @property {number | null} port the number of the socket; null: none was free, or it concerns none
 * @property {string} title what was refused
 * @property {string} what its kind, in words; may be empty
 * @property {any} error `code` or `reason`, `message`, perhaps `remedy`, `command`, `setting`, `value`, `alternative`
 * @property {string} [icon] of what was refused
 * @property {{method: string, params: any} | null} retry the request that was refused
 */

/** The state at the start. */
export const initial = Object.freeze({
  /** to the page's server: connecting, open, gone, refused */
  link: { state: "connecting", reason: "", retryAt: 0, tries: 0 },
  /** @type {any} hello of the page's server */
  server: null,
  /** @type {any[] | null} rows of the board */
  sessions: null,
  /** @type {string | null} the session that is open */
  session: null,
  /** @type {any} its hello */
  hello: null,
  /** @type {any} */
  snapshot: null,
  /** @type {string | null} why the session ended; null: it runs */
  ended: null,
  /** @type {any} the last event lost or closed with its reason */
  loss: null,
  /** @type {{holder: {name: string, you: boolean} | null, watchers: number} | null} null: not known */
  driver: null,
  screen: { state: "unknown", message: "", remedy: /** @type {any} */ (null), width: 0, height: 0 },
  inputs: { locks: /** @type {string[]} */ ([]), mouse: "none" },
  /** @type {any[]} newest first */
  log: [],
  logged: /** @type {number} */ (0),
  /** @type {Record<string, any>} by id of the attachment */
  rates: {},
  /** @type {Record<string, number>} since when an attachment is in its state, by its id */
  since: {},
  /** @type {Record<string, string | null>} the medium of a CD drive, by its label; null: none */
  drives: {},
  /** @type {Record<string, any>} by id of the medium: what the VM has read of this browser's files */
  media: {},
  /** @type {Record<string, string>} the shell command of what was plugged in here, by id of the attachment */
  commands: {},
  /** @type {any[]} what is being asked of the session */
  pending: [],
  /** @type {Refusal[]} */
  refusals: [],
  refused: /** @type {number} */ (0),
  /** @type {any} */
  devices: null,
  /** @type {{done: number, total: number} | null} */
  typing: null,
  stats: { frames: 0, roundTrip: 0 },
});

/** @typedef {typeof initial} State */

/**
 * Return the state after an action.
 *
 * @param {State} state
 * @param {any} action `type`, and what belongs to it; `now`: seconds since 1970
 * @returns {State}
 */
export function reduce(state, action) {
  switch (action.type) {
    case "link":
      return { ...state, link: { ...state.link, ...action.link } };
    case "server":
      return { ...state, server: action.server, link: { state: "open", reason: "", retryAt: 0, tries: 0 } };
    case "sessions":
      return { ...state, sessions: action.sessions };
    case "opened":
      return {
        ...initial, link: state.link, server: state.server, sessions: state.sessions, stats: state.stats,
        session: action.session, hello: action.hello,
        // After a loss of the page's server the same session is opened again: what was said and refused stays.
        ...(state.session === action.session ? pick(state, ["log", "logged", "refusals", "refused", "rates", "since", "commands"]) : {}),
      };
    case "left":
      return { ...initial, link: state.link, server: state.server, sessions: state.sessions };
    case "snapshot":
      return { ...state, snapshot: action.snapshot };
    case "drives":
      return { ...state, drives: Object.fromEntries(action.drives.map((/** @type {any} */ one) => [one.label, one.medium])) };
    case "devices":
      return { ...state, devices: action.devices };
    case "stats":
      return { ...state, stats: { ...state.stats, ...action.stats } };
    case "pending":
      return { ...state, pending: [...state.pending, action.pending] };
    case "settled":
      return { ...state, pending: state.pending.filter((one) => one.id !== action.id) };
    case "refusal":
      return withRefusal(state, action.refusal);
    case "put-away":
      return { ...state, refusals: state.refusals.filter((one) => one.id !== action.id) };
    case "media":
      return { ...state, media: { ...state.media, [action.media]: { ...state.media[action.media], ...action.fields } } };
    case "commands":
      return { ...state, commands: { ...state.commands, ...action.commands } };
    case "event":
      return afterEvent(state, action.name, action.data, action.now);
  }
  throw new Error(`${action.type} is not a type of action`);
}

/** @param {State} state @param {Omit<Refusal, "id">} refusal @returns {State} */
function withRefusal(state, refusal) {
  const id = state.refused + 1;
  // One refusal stands at a socket: the newest.
  const others = state.refusals.filter((one) => refusal.port === null || one.port !== refusal.port);
  return { ...state, refused: id, refusals: [...others, { ...refusal, id }].slice(-MAX_REFUSALS) };
}

/** @param {State} state @param {string} name @param {any} data @param {number} now @returns {State} */
function afterEvent(state, name, data, now) {
  switch (name) {
    case "sessions":
      return { ...state, sessions: data.sessions };
    case "session-ended":
      return { ...state, ended: data.reason ?? "", driver: null };
    case "screen-state":
      return { ...state, screen: { ...state.screen, ...pick(data, ["state"]), message: data.message ?? "", remedy: data.remedy ? data : null } };
    case "screen":
      return state.screen.width === data.width && state.screen.height === data.height && state.screen.state === "shown" ? state
        : { ...state, screen: { ...state.screen, state: state.screen.state === "unknown" ? "shown" : state.screen.state, width: data.width, height: data.height } };
    case "inputs":
      return { ...state, inputs: { locks: data.locks, mouse: data.mouse } };
    case "typing":
      return { ...state, typing: data.done >= data.total ? null : { done: data.done, total: data.total } };
    case "media-progress":
      return { ...state, media: { ...state.media, [data.media]: progress(state.media[data.media], data, now) } };
    case "driving":
      return { ...state, driver: { holder: data.holder, watchers: data.watchers } };
  }
  if (typeof data.id !== "number" || state.snapshot === null) return state;
  if (data.id <= state.snapshot.last_event) return state;
  const event = { ...data, event: name };
  const before = state.snapshot.guests[data.guest]?.attachments[data.attachment];
  let after = { ...state, snapshot: apply(state.snapshot, event) };
  const changed = after.snapshot.guests[data.guest]?.attachments[data.attachment];
  if (changed === undefined) after = { ...after, since: without(after.since, data.attachment) };
  else if (changed.state !== before?.state) after = { ...after, since: { ...after.since, [data.attachment]: data.time } };
  if (name === "figures") after = { ...after, rates: { ...after.rates, [data.attachment]: measured(after.rates[data.attachment], data, before?.figures) } };
  if (name === "removed") after = { ...after, rates: without(after.rates, data.attachment) };
  if (name === "opened") after = { ...after, drives: { ...after.drives, ...inDrives(data.units ?? []) } };
  if (name === "medium-inserted") after = { ...after, drives: { ...after.drives, [data.device]: data.medium } };
  if (name === "medium-ejected") after = { ...after, drives: { ...after.drives, [data.device]: null } };
  if (name === "attached") {
    const port = portOf(after, data);
    after = { ...after, refusals: after.refusals.filter((one) => port === null || one.port !== port) };
  }
  if (name === "lost" || name === "closed") after = { ...after, loss: name === "closed" && after.loss ? after.loss : { ...data, name } };
  if (name === "connected") after = { ...after, loss: null };
  if (name === "refused" && before !== undefined) {
    const error = data.error !== null && typeof data.error === "object" ? data.error : { message: data.message, ...pick(data, ["remedy", "command", "setting", "value"]) };
    after = withRefusal(after, { port: portOf(after, before), title: shortName(before.label), what: "", error, retry: null });
  }
  return logged(after, name, data);
}

/** @param {string[]} titles of units, such as `cdrom0 (installer.iso)` @returns {Record<string, string>} the media by the labels of their drives */
function inDrives(titles) {
  return Object.fromEntries(titles.map((title) => /^(cdrom\d+) \((.*)\)$/s.exec(title)).filter((one) => one !== null).map((one) => [one[1], one[2]]));
}

/** Events of which only programs take note. */
const QUIET = new Set(["figures", "drive", "copying", "port", "removed", "listener-failed", "attaching", "opened"]);

/** @param {State} state @param {string} name @param {any} data @returns {State} */
function logged(state, name, data) {
  // Watchers see what whoever drives types, presses and clicks.
  const acts = name === "input" && !(state.driver?.holder?.you && state.driver.holder.name === data.client);
  if ((data.level === "detail" && !acts) || QUIET.has(name) || !data.message) return state;
  const entry = {
    key: state.logged + 1, time: data.time, level: name === "presence-asked" ? "asks" : data.level ?? "info", device: data.device ?? "",
    message: acts && data.text ? `${data.message}: ${data.text}` : data.message,
    remedy: data.remedy ?? "", fix: data.command ?? "", name, attachment: data.attachment ?? null,
  };
  return { ...state, logged: entry.key, log: [entry, ...state.log].slice(0, MAX_LOG) };
}

/**
 * Return the number of the socket in which an attachment is; null: not known.
 *
 * @param {State} state
 * @param {any} attachment or an event with a `port`
 */
export function portOf(state, attachment) {
  const number = ports(state).findIndex((/** @type {any} */ one) => one.name === attachment?.port);
  return number < 0 ? null : number;
}

/**
 * Return the id and the name of a file that a browser offers: `client:ID/NAME`; null: the path is another one.
 *
 * @param {unknown} path
 */
export function offered(path) {
  const found = /^client:([^/]*)(?:\/(.*))?$/s.exec(String(path ?? ""));
  return found === null ? null : { media: found[1], name: found[2] ?? "" };
}

/** @param {unknown} message @returns {string} without the ids of files of browsers */
export function withoutIds(message) {
  return String(message ?? "").replaceAll(/\bclient:[^/\s]*\//g, "");
}

/** @param {unknown} label of a device or a medium @returns {string} without the id of a browser's file */
export function shortName(label) {
  return offered(label)?.name || String(label ?? "");
}

/** @param {State} state @returns {any} the guest of the session; null: not known */
export function guest(state) {
  const guests = state.snapshot === null ? [] : Object.values(state.snapshot.guests);
  return guests[0] ?? null;
}

/** @param {State} state @returns {any[]} the ports of the VM */
export function ports(state) {
  return guest(state)?.ports ?? [];
}

/** @param {State} state @returns {any[]} the attachments of the VM */
export function attachments(state) {
  return Object.values(guest(state)?.attachments ?? {});
}

/** @param {any} rates @param {any} data @param {any} before the figures before */
function measured(rates, data, before) {
  const last = rates?.samples.at(-1);
  const read = before?.read ?? data.read;
  const written = before?.written ?? data.written;
  const time = data.time;
  // Figures come after a change, at most once a second: after a pause the rate is that of the last second.
  const seconds = last === undefined ? 1 : Math.min(Math.max(time - last.time, 0.25), 1.5);
  const sample = { time, read: Math.max(0, data.read - read) / seconds, written: Math.max(0, data.written - written) / seconds };
  const samples = [...(rates?.samples ?? []), sample].filter((one) => one.time > time - CHART_SECONDS - 2);
  return { samples, lastWrite: data.written > written ? time : rates?.lastWrite ?? 0 };
}

/**
 * Return the rates of an attachment, one for each of the last seconds, the oldest first.
 *
 * @param {any} rates of the state
 * @param {number} now seconds since 1970, by the session's clock
 * @returns {{read: number, written: number}[]}
 */
export function lastMinute(rates, now) {
  /** @type {{read: number, written: number}[]} */
  const seconds = Array.from({ length: CHART_SECONDS }, () => ({ read: 0, written: 0 }));
  for (const sample of rates?.samples ?? []) {
    const place = CHART_SECONDS - 1 - Math.round(now - sample.time);
    if (place >= 0 && place < CHART_SECONDS) seconds[place] = { read: sample.read, written: sample.written };
  }
  return seconds;
}

/** @param {any} media @param {any} data @param {number} now */
function progress(media, data, now) {
  const seconds = media?.time ? Math.max(now - media.time, 0.25) : 1;
  return { ...media, read: data.read, last: data.last, touched: data.touched, time: now, rate: Math.max(0, data.read - (media?.read ?? 0)) / seconds };
}

/** @param {Record<string, any>} object @param {string} name */
function without(object, name) {
  const { [name]: removed, ...others } = object;
  return others;
}

/**
 * Return the overlay that the state asks for: what has stopped the picture.
 *
 * @param {State} state
 * @returns {"server" | "ended" | "lost" | "gone" | "connecting" | "no-display" | "no-picture" | null}
 */
export function overlay(state) {
  if (state.link.state !== "open") return "server";
  if (state.ended !== null) return "ended";
  const now = guest(state)?.state;
  if (now === "lost" || now === "reconnecting") return "lost";
  if (now === "closed") return "gone";
  if (state.snapshot === null || now === undefined || now === "connecting") return "connecting";
  if (state.screen.state === "no-display" || state.screen.state === "no-picture") return state.screen.state;
  if (state.screen.state === "lost") return "lost";
  return null;
}

/** @param {State} state @returns {boolean} whether this page may change something */
export function mayAct(state) {
  if (state.server?.role !== "full" || state.link.state !== "open" || state.ended !== null) return false;
  if (["lost", "reconnecting", "closed"].includes(guest(state)?.state)) return false;
  return state.driver === null || state.driver.holder === null || state.driver.holder.you;
}

/** @param {State} state @returns {boolean} whether keys and the pointer of this page go to the VM */
export function drives(state) {
  return state.server?.role === "full" && state.driver?.holder?.you === true;
}

/**
 * Return the serial lines whose terminals the page has.
 *
 * @param {any} state
 * @returns {{label: string, attachment: string}[]}
 */
export function lines(state) {
  if (!mayAct(state)) return [];
  return attachments(state).flatMap((/** @type {any} */ one) => one.units
    .map((/** @type {string} */ label, /** @type {number} */ at) => ({ label, attachment: one.id, at }))
    .filter((/** @type {any} */ { at }) => one.sources?.[at]?.kind === "serial" && [one.details].flat()[at] === "client"));
}
