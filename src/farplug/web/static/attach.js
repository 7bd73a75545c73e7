/** The dialog: what to plug into a socket, or to insert into a drive, and how. */

import { h, icon, mid, plain } from "./dom.js";
import { bytes, day } from "./figures.js";
import { deviceList, fileIcon, pathNav, problemText, virtualList } from "./panel.js";
import { command, tabs } from "./parts.js";
import { T } from "./texts.js";

/** @typedef {import("./app.js").App} App */

/** What the dialog chooses at first. */
export const FRESH = { port: /** @type {number | null} */ (null), insert: /** @type {any} */ (null), tab: "image", path: "", selected: /** @type {string | null} */ (null), as: "disk", mode: "read", speed: "auto", find: "" };

/** @param {App} app @returns {any[]} */
export function dialog(app) {
  const chosen = app.ui.dialog;
  if (chosen === null) return [];
  const change = (/** @type {any} */ fields) => app.setUi({ dialog: { ...app.ui.dialog, ...fields } });
  const request = wanted(app);
  const shell = request === null ? "" : app.commandFor(request.method, request.params);
  const choices = chosen.insert ? ["image", "browser"] : chosen.tab === "camera" ? ["camera"] : ["image", "folder", "device", "browser", "virtual"];
  const icons = /** @type {Record<string, string>} */ ({ image: "i-disk", folder: "i-folder", device: "i-device", browser: "i-up", virtual: "i-keyboard", camera: "i-camera" });
  const words = /** @type {Record<string, string>} */ ({ image: T.image, folder: T.folder, device: T.device, browser: T.thisBrowser, virtual: T.virtual, camera: T.kinds.camera });
  const files = ["image", "folder", "camera"].includes(chosen.tab);
  return [h("form", { method: "dialog", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); submit(app, request); } },
    h("header", null, h("h2", { id: "attach-t" }, chosen.insert ? T.insertInto(plain(chosen.insert.units[0] ?? chosen.insert.label)) : chosen.tab === "camera" ? T.plugCamera : T.plugIntoSocket(chosen.port)),
      h("button", { class: "b icon quiet", type: "button", "aria-label": T.close, onclick: () => app.closeDialog() }, icon("i-close"))),
    choices.length > 1 && tabs(T.whatToPlug, choices.map((name) => ({ name, content: [icon(icons[name]), words[name]] })), chosen.tab, (tab) => change({ tab, selected: null }), { panel: "attach-p" }),
    h("div", { class: "pick", id: "attach-p", role: "tabpanel", "aria-label": words[chosen.tab] },
      files ? [fileList(app, chosen, change), how(app, chosen, change)] : chosen.tab === "device" ? h("div", { class: "files one" }, deviceList(app)) : chosen.tab === "virtual" ? h("div", { class: "files one" }, virtualList(app))
        : h("div", { class: "files one frombrowser" }, h("p", null, T.browserText),
          h("p", { class: "row" }, h("button", { class: "b", type: "button", onclick: () => { app.chooseFile(chosen.insert ? null : chosen.port, false, chosen.insert); app.closeDialog(); } }, T.choose),
            app.canUpload() && h("button", { class: "b", type: "button", onclick: () => { app.chooseFile(chosen.insert ? null : chosen.port, true, chosen.insert); app.closeDialog(); } }, T.uploadFirst)))),
    files && h("footer", null,
      h("div", { class: "same" }, shell ? [h("p", null, T.sameFromShell), command(app, shell)] : h("p", null, request !== null ? "" : chosen.tab === "camera" ? T.clipOrFolder : T.chooseFirst)),
      h("p", { class: "row" }, h("button", { class: "b", type: "button", onclick: () => app.closeDialog() }, T.cancel),
        h("button", { class: "b main", type: "submit", disabled: request === null }, chosen.insert ? T.insert.replace("…", "") : T.plugIn))))];
}

/** @param {App} app @returns {{method: string, params: any, name: string} | null} the request that the dialog would send */
function wanted(app) {
  const chosen = app.ui.dialog;
  if (chosen === null) return null;
  if (chosen.tab === "folder" || chosen.tab === "camera") {
    const name = chosen.selected ?? (chosen.path === "" ? null : "");
    if (name === null) return null;
    const path = name === "" ? chosen.path : app.join(chosen.path, name);
    // With a slash, since `pattern` alone is the test picture.
    if (chosen.tab === "camera") return { method: "attach", params: { sources: [{ kind: "camera", path: path === "pattern" ? `${path}/` : path }] }, name: path.split("/").at(-1) ?? path };
    return { method: "attach", params: { sources: [{ kind: "folder", path }], ...speed(chosen) }, name: path.split("/").at(-1) ?? path };
  }
  if (chosen.tab !== "image" || chosen.selected === null) return null;
  const path = app.join(chosen.path, chosen.selected);
  if (chosen.insert) return { method: "insert", params: { path, drive: chosen.insert.units[0] ?? chosen.insert.label }, name: chosen.selected };
  const kind = chosen.as === "cdrom" ? "cdrom" : chosen.mode === "read" ? "read-only-disk" : "disk";
  const storage = { ...(chosen.speed === "auto" ? {} : { speed: chosen.speed }), ...(kind === "disk" && chosen.mode === "snapshot" ? { snapshot: true } : {}) };
  return { method: "attach", params: { sources: [{ kind, path }], ...(Object.keys(storage).length > 0 ? { storage } : {}) }, name: chosen.selected };
}

/** @param {any} chosen */
function speed(chosen) {
  return chosen.speed === "auto" ? {} : { storage: { speed: chosen.speed } };
}

/** @param {App} app @param {{method: string, params: any, name: string} | null} request */
function submit(app, request) {
  const chosen = app.ui.dialog;
  if (request === null || chosen === null) return;
  app.closeDialog();
  if (request.method === "insert") app.insert(chosen.insert, request.params);
  else app.plug(request.params, { port: chosen.port, title: request.name, what: T.kinds[request.params.sources[0].kind], icon: request.params.sources[0].kind === "cdrom" ? "i-cd" : chosen.tab === "camera" ? "i-camera" : chosen.tab === "folder" ? "i-folder" : "i-disk" });
}

/** @param {App} app @param {any} chosen @param {(fields: any) => void} change */
function fileList(app, chosen, change) {
  if (app.state.server?.web_root === null) return h("div", { class: "files one" }, h("p", { class: "nothing" }, T.noRoot, " ", T.noRootRemedy), h("div", { class: "inset" }, command(app, T.noRootCommand)));
  const listing = app.filesOf(chosen.path);
  const words = chosen.find.trim().toLowerCase();
  const folders = chosen.tab === "folder";
  const entries = (listing?.entries ?? []).filter((/** @type {any} */ one) => one.name.toLowerCase().includes(words) && (!folders || one.kind === "folder") && (chosen.tab !== "camera" || one.kind === "folder" || one.as === "clip") && (!chosen.insert || one.kind === "folder" || one.as === "cdrom" || one.problem));
  return h("div", { class: "files" },
    h("div", { class: "path" }, pathNav(app, chosen.path, (path) => change({ path, selected: null })),
      h("label", { class: "find" }, icon("i-search"), h("input", { type: "search", placeholder: T.find, "aria-label": T.findFile, value: chosen.find, oninput: (/** @type {any} */ event) => change({ find: event.target.value }) }))),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": T.filesIn(plain(chosen.path || (app.state.server?.web_root?.name ?? ""))) },
      listing?.error ? h("p", { class: "nothing reason" }, icon("s-stop", "s"), plain(listing.error.message))
        : listing === null ? h("p", { class: "nothing" }, T.connecting)
          : h("table", null,
            h("thead", null, h("tr", null, h("th", { scope: "col" }, T.name), h("th", { scope: "col" }, T.whatItIs), h("th", { scope: "col", class: "num" }, T.size), h("th", { scope: "col", class: "opt" }, T.changed))),
            h("tbody", null, entries.map((/** @type {any} */ one) => fileRow(app, chosen, change, one)))),
      listing !== null && !listing.error && entries.length === 0 && h("p", { class: "nothing" }, T.emptyFolder)));
}

/** @param {App} app @param {any} chosen @param {(fields: any) => void} change @param {any} one */
function fileRow(app, chosen, change, one) {
  const folder = one.kind === "folder";
  const picture = icon(fileIcon(one));
  const camera = chosen.tab === "camera";
  const problem = one.problem ? problemText(one.problem) : one.as === "clip" && !camera ? T.isClip : !folder && one.as === null ? T.notAFile : "";
  if (problem) return h("tr", { key: one.name, class: "no" },
    h("th", { scope: "row" }, h("label", null, h("input", { type: "radio", name: "file", disabled: true }), picture, mid(one.name))),
    h("td", { colspan: "2" }, icon("s-stop", "s"), " ", plain(problem)), h("td", { class: "opt" }));
  if (folder && chosen.tab === "image") return h("tr", { key: one.name },
    h("th", { scope: "row" }, h("button", { class: "b link folder", type: "button", "aria-label": T.openFolder(plain(one.name)), onclick: () => change({ path: app.join(chosen.path, one.name), selected: null }) }, picture, mid(one.name))),
    h("td", null, T.folder.toLowerCase()), h("td", { class: "num" }), h("td", { class: "opt" }, one.modified ? day(one.modified, app.now()) : ""));
  const selected = chosen.selected === one.name;
  const choose = () => change(folder ? { selected: one.name } : { selected: one.name, as: one.as === "cdrom" ? "cdrom" : "disk" });
  return h("tr", { key: one.name, class: selected ? "sel" : undefined, ondblclick: folder ? () => change({ path: app.join(chosen.path, one.name), selected: null }) : undefined },
    h("th", { scope: "row" }, h("label", null, h("input", { type: "radio", name: "file", checked: selected, onchange: choose }), picture, mid(one.name))),
    h("td", null, one.what ? plain(one.what) : folder ? h("button", { class: "b link", type: "button", "aria-label": T.openFolder(plain(one.name)), onclick: () => change({ path: app.join(chosen.path, one.name), selected: null }) }, T.folder.toLowerCase()) : camera ? T.clip : one.as === "cdrom" ? T.cdrom : T.disk),
    h("td", { class: "num" }, folder ? "" : bytes(one.size ?? 0)), h("td", { class: "opt" }, one.modified ? day(one.modified, app.now()) : ""));
}

/** @param {App} app @param {any} chosen @param {(fields: any) => void} change */
function how(app, chosen, change) {
  if (chosen.insert) return null;
  const radio = (/** @type {string} */ group, /** @type {string} */ value, /** @type {any} */ content) =>
    h("label", { key: value }, h("input", { type: "radio", name: group, checked: chosen[group] === value, onchange: () => change({ [group]: value }) }), h("span", null, content));
  return h("div", { class: "how" },
    chosen.tab === "camera" ? h("p", { class: "dim" }, T.clipText) : chosen.tab === "folder" ? h("p", { class: "dim" }, T.folderText) : [
      h("fieldset", { key: "as" }, h("legend", null, T.vmSees), h("div", { class: "choices two" },
        radio("as", "disk", [icon("i-disk"), h("b", null, T.disk)]), radio("as", "cdrom", [icon("i-cd"), h("b", null, T.cdrom)]))),
      chosen.as === "disk" && h("fieldset", { key: "mode" }, h("legend", null, T.itMay), h("div", { class: "choices" },
        [["read", T.onlyRead], ["snapshot", T.writeSnapshot], ["write", T.write]].map(([value, words]) => radio("mode", String(value), [h("b", null, words[0]), h("small", null, words[1])])))),
    ],
    chosen.tab !== "camera" && h("label", { class: "field", key: "speed" }, T.speed, h("select", { value: chosen.speed, onchange: (/** @type {any} */ event) => change({ speed: event.target.value }) },
      T.speedChoices.map(([value, words]) => h("option", { value, key: value }, words)))));
}
