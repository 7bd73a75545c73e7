/**
 * Elements from descriptions: h() describes an element, patch() makes the children of a node as described, and changes
 * only what differs: focus, selection and scroll positions stay. Text is only ever set as text.
 */

const SVG = "http://www.w3.org/2000/svg";
const STATE = Symbol("described");
/** Set as properties: their attributes hold only the initial value. */
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open"]);

/**
 * @typedef {{tag: string, key: string | undefined, props: Record<string, any>, children: (Described | string)[]}} Described
 * @typedef {any} Content a description, text, a number, an array of them; null, undefined, false: nothing
 */

/** Milliseconds after which what waits for a frame is done without one: hidden and starved tabs have none. */
const NO_FRAME = 250;

/**
 * Call a function once, at the next frame; where none comes soon, without one.
 *
 * @param {() => void} run
 * @returns {() => void} a function that cancels the call
 */
export function atNextFrame(run) {
  const cancel = () => {
    cancelAnimationFrame(frame);
    clearTimeout(timer);
  };
  const once = () => {
    cancel();
    run();
  };
  const frame = requestAnimationFrame(once);
  const timer = setTimeout(once, NO_FRAME);
  return cancel;
}

/**
 * Return the description of an element.
 *
 * @param {string} tag
 * @param {Record<string, any> | null} [props] attributes; `on…`: listeners; `key`: identifies the element among its
 *   siblings; `style`: custom properties; `ref`: called with the element when it is made; `opaque`: the children belong to
 *   somebody else.
 * @param {...Content} children
 * @returns {Described}
 */
export function h(tag, props, ...children) {
  /** @type {(Described | string)[]} */
  const flat = [];
  flatten(children, flat);
  const { key, ...rest } = props ?? {};
  return { tag, key, props: rest, children: flat };
}

/** @param {Content[]} children @param {(Described | string)[]} flat */
function flatten(children, flat) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) flatten(child, flat);
    else if (typeof child === "object") flat.push(child);
    else if (typeof flat.at(-1) === "string") flat.push(`${flat.pop()}${child}`);
    else flat.push(String(child));
  }
}

/**
 * Make the children of a node as described.
 *
 * @param {Element} parent
 * @param {(Described | string)[]} wanted
 */
export function patch(parent, wanted) {
  const keys = new Set(wanted.map((one) => (typeof one === "string" ? undefined : one.key)));
  /** @type {Map<string, any>} */
  const keyed = new Map();
  for (const node of parent.childNodes) {
    const key = /** @type {any} */ (node)[STATE]?.key;
    if (key !== undefined) keyed.set(key, node);
  }
  /** @type {any} */
  let cursor = parent.firstChild;
  for (const one of wanted) {
    while (cursor !== null && cursor[STATE]?.key !== undefined && !keys.has(cursor[STATE].key)) {
      const stale = cursor;
      cursor = cursor.nextSibling;
      stale.remove();
    }
    let node = typeof one !== "string" && one.key !== undefined ? keyed.get(one.key) : cursor;
    if (!fits(node, one)) {
      node = make(one, parent);
      parent.insertBefore(node, cursor);
      // An unkeyed node of another kind is replaced, so that the ones behind it keep their places.
      if (cursor !== null && cursor[STATE]?.key === undefined && (typeof one === "string" || one.key === undefined)) {
        const stale = cursor;
        cursor = cursor.nextSibling;
        stale.remove();
      }
    } else if (node !== cursor) {
      parent.insertBefore(node, cursor);
    } else {
      cursor = cursor.nextSibling;
    }
    update(node, one);
  }
  while (cursor !== null) {
    const stale = cursor;
    cursor = cursor.nextSibling;
    stale.remove();
  }
}

/** @param {any} node @param {Described | string} one */
function fits(node, one) {
  if (node === null || node === undefined) return false;
  if (typeof one === "string") return node.nodeType === Node.TEXT_NODE;
  return node[STATE]?.tag === one.tag && node[STATE].key === one.key;
}

/** @param {Described | string} one @param {Element} parent @returns {any} */
function make(one, parent) {
  if (typeof one === "string") return document.createTextNode(one);
  const inSvg = one.tag === "svg" || parent.namespaceURI === SVG;
  /** @type {any} */
  const node = inSvg ? document.createElementNS(SVG, one.tag) : document.createElement(one.tag);
  node[STATE] = { tag: one.tag, key: one.key, props: {} };
  if (one.props.ref) one.props.ref(node);
  return node;
}

/** @param {any} node @param {Described | string} one */
function update(node, one) {
  if (typeof one === "string") {
    if (node.data !== one) node.data = one;
    return;
  }
  const before = node[STATE].props;
  for (const name of Object.keys(before)) if (!(name in one.props)) set(node, name, undefined, before[name]);
  if (!one.props.opaque) patch(node, one.children);
  for (const [name, value] of Object.entries(one.props)) set(node, name, value, before[name]);
  node[STATE].props = one.props;
}

/** @param {any} node @param {string} name @param {any} value @param {any} before */
function set(node, name, value, before) {
  if (name === "ref" || name === "opaque") return;
  if (name === "style") {
    for (const property of Object.keys(before ?? {})) if (!(property in (value ?? {}))) node.style.removeProperty(property);
    for (const [property, text] of Object.entries(value ?? {})) node.style.setProperty(property, text);
  } else if (name.startsWith("on")) {
    node[name] = value ?? null;
  } else if (PROPERTIES.has(name)) {
    if (node[name] !== (value ?? false)) node[name] = value ?? false;
  } else if (value === before) {
    return;
  } else if (value === undefined || value === null || value === false) {
    node.removeAttribute(name);
  } else {
    node.setAttribute(name, value === true ? "" : String(value));
  }
}

/**
 * Return a drawing of the sprite.
 *
 * @param {string} name of the symbol: `i-cd`
 * @param {string} [kind] `i` 16 px, `s` a mark of 12 px, `m` a small port
 */
export function icon(name, kind = "i") {
  return h("svg", { class: kind, "aria-hidden": "true" }, h("use", { href: sprite(name) }));
}

/** @param {string} name @returns {string} the address of a symbol */
export function sprite(name) {
  return `static/icons.svg#${name}`;
}

/**
 * Return text from outside: control characters, and those that turn the direction of writing, become visible.
 *
 * @param {unknown} text
 */
export function plain(text) {
  const visible = String(text ?? "").replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
  return visible.toWellFormed?.() ?? visible;
}

/**
 * Return a name that is cut in its middle where the space ends, so that its ending stays.
 *
 * @param {unknown} text
 */
export function mid(text) {
  const name = plain(text);
  const letters = [...name];
  if (letters.length <= 20) return h("span", { class: "mid", title: name }, h("span", null, name));
  return h("span", { class: "mid", title: name },
    h("span", null, letters.slice(0, -14).join("")), h("span", null, letters.slice(-14).join("")));
}
