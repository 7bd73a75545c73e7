/**
 * The keyboard of this machine, as that of the VM: physical keys, while the picture has them. Ctrl+Alt, pressed and
 * released alone, lets go; so do losing the focus and losing the window. All keys are released then.
 */

const MODIFIERS = /^(Control|Alt)(Left|Right)$/;

export class Keyboard {
  /**
   * @param {object} owner
   * @param {(method: string, params: any) => void} owner.send
   * @param {() => void} owner.leave called when Ctrl+Alt lets go
   * @param {() => string[]} owner.takeHeld the codes of modifiers that are held for the next key
   */
  constructor(owner) {
    this.owner = owner;
    /** @type {Set<string>} */
    this.down = new Set();
    /** @type {Map<string, string[]>} modifiers that are held for a key, by its code */
    this.heldFor = new Map();
    /** Ctrl and Alt are down, and no other key was. */
    this.chord = false;
  }

  /** @param {KeyboardEvent} event */
  keydown(event) {
    event.preventDefault();
    event.stopPropagation();
    const code = event.code;
    if (code === "" || code === "Unidentified" || event.repeat || event.isComposing) return;
    if (!MODIFIERS.test(code)) {
      const held = this.owner.takeHeld();
      for (const modifier of held) this.owner.send("key", { code: modifier, down: true });
      if (held.length > 0) this.heldFor.set(code, held);
    }
    this.down.add(code);
    this.chord = this.down.size === 2 && this.has("Control") && this.has("Alt");
    this.owner.send("key", { code, down: true });
  }

  /** @param {KeyboardEvent} event */
  keyup(event) {
    event.preventDefault();
    event.stopPropagation();
    const code = event.code;
    if (!this.down.delete(code)) return;
    this.owner.send("key", { code, down: false });
    for (const modifier of this.heldFor.get(code) ?? []) this.owner.send("key", { code: modifier, down: false });
    this.heldFor.delete(code);
    // macOS reports no release of keys that were released while Meta was down.
    if (code.startsWith("Meta") && this.down.size > 0) this.releaseAll();
    if (this.chord && MODIFIERS.test(code)) {
      this.chord = false;
      this.owner.leave();
    }
  }

  /** @param {string} name @returns {boolean} */
  has(name) {
    return this.down.has(`${name}Left`) || this.down.has(`${name}Right`);
  }

  /** Release all keys and buttons. */
  releaseAll() {
    this.down.clear();
    this.heldFor.clear();
    this.chord = false;
    this.owner.send("keys-up", {});
  }
}

/** The keys of a phone's keyboard that are no text. */
export const PHONE_KEYS = new Map([
  ["insertLineBreak", "Enter"], ["insertParagraph", "Enter"], ["deleteContentBackward", "Backspace"],
  ["deleteWordBackward", "Backspace"], ["deleteContentForward", "Delete"],
]);

/** Modifiers that can be held for the next key: their name for `press`, and their code. */
export const HOLD = [
  { name: "ctrl", code: "ControlLeft" }, { name: "alt", code: "AltLeft" }, { name: "shift", code: "ShiftLeft" },
  { name: "super", code: "MetaLeft" }, { name: "altgr", code: "AltRight" },
];

/** Keys that a browser keeps for itself, or that a keyboard lacks: label and name for `press`. */
export const PRESS = [
  ["Esc", "Escape"], ["Tab", "Tab"], ["F1", "F1"], ["F2", "F2"], ["F3", "F3"], ["F4", "F4"], ["F5", "F5"], ["F6", "F6"], ["F7", "F7"],
  ["F8", "F8"], ["F9", "F9"], ["F10", "F10"], ["F11", "F11"], ["F12", "F12"], ["Print", "Print"], ["Pause", "Pause"],
  ["Ins", "Insert"], ["Del", "Delete"], ["Home", "Home"], ["End", "End"], ["PgUp", "Page_Up"], ["PgDn", "Page_Down"], ["Menu", "Menu"],
];

/** Keys that are pressed together. */
export const TOGETHER = [
  ["Ctrl+Alt+Del", "ctrl+alt+Delete"], ["Ctrl+Alt+F1", "ctrl+alt+F1"], ["Ctrl+Alt+F2", "ctrl+alt+F2"], ["Alt+Tab", "alt+Tab"],
  ["Alt+F4", "alt+F4"], ["SysRq+S", "alt+Sys_Req+s"], ["SysRq+U", "alt+Sys_Req+u"], ["SysRq+B", "alt+Sys_Req+b"],
];
