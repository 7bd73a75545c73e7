/**
 * Mouse, pen and fingers over the picture, as the pointer of the VM: positions where the VM has a tablet, otherwise
 * distances, with the pointer locked. Fingers: a tap clicks, a long press is the right button, one finger drags, two
 * turn the wheel.
 */

const BUTTONS = [[1, "left"], [4, "middle"], [2, "right"]];
const LONG_PRESS = 500;
/** Pixels that a finger may move in a tap. */
const SLACK = 8;
/** Pixels of a wheel event, or of two fingers, for one notch. */
const NOTCH = 53;
const FINGER_NOTCH = 24;
/** Notches in one request; a wheel that turns faster turns no further. */
const MAX_WHEEL = 15;

export class Pointer {
  /**
   * @param {object} owner
   * @param {(method: string, params: any) => void} owner.send
   * @param {import("./screen.js").Picture} owner.picture
   * @param {() => boolean} owner.take the picture was pressed: take the keys; returns whether the pointer goes to the VM
   * @param {() => boolean} owner.active whether the pointer goes to the VM
   * @param {() => string} owner.mode `absolute`, `relative` or `none`
   */
  constructor(owner) {
    this.owner = owner;
    this.wheel = 0;
    /** @type {Map<number, {x: number, y: number}>} fingers that are down */
    this.fingers = new Map();
    this.finger = { x: 0, y: 0, state: "none" };
    this.timer = 0;
  }

  /** @param {HTMLElement} element that shows the picture */
  attach(element) {
    element.addEventListener("pointerdown", (event) => this.down(event));
    element.addEventListener("pointermove", (event) => this.move(event));
    element.addEventListener("pointerup", (event) => this.up(event));
    element.addEventListener("pointercancel", (event) => this.up(event));
    element.addEventListener("contextmenu", (event) => { if (onPicture(event)) event.preventDefault(); });
    element.addEventListener("wheel", (event) => this.turned(event), { passive: false });
  }

  /** @param {number} buttons of a mouse event @returns {string[]} */
  names(buttons) {
    return BUTTONS.filter(([mask]) => buttons & Number(mask)).map(([, name]) => String(name));
  }

  /** @param {{clientX: number, clientY: number}} at @param {string[]} buttons @param {number} [wheel] */
  place(at, buttons, wheel) {
    if (this.owner.mode() === "none") return;
    const where = this.owner.mode() === "absolute" ? this.owner.picture.position(at.clientX, at.clientY) : { dx: 0, dy: 0 };
    this.owner.send("pointer", { ...where, buttons, ...(wheel ? { wheel } : {}) });
  }

  /** @param {PointerEvent} event */
  down(event) {
    if (!onPicture(event)) return;
    const taken = this.owner.take();
    if (event.pointerType === "touch") event.preventDefault();
    if (!taken) return;
    const element = /** @type {HTMLElement} */ (event.currentTarget);
    if (event.pointerType === "touch") {
      this.fingerDown(event);
      return;
    }
    if (event.button === 1) event.preventDefault();
    if (this.owner.mode() === "relative") {
      if (document.pointerLockElement !== element) {
        element.requestPointerLock();
        return;
      }
    } else element.setPointerCapture(event.pointerId);
    this.place(event, this.names(event.buttons));
  }

  /** @param {PointerEvent} event */
  move(event) {
    if (!this.owner.active()) return;
    if (event.pointerType === "touch") {
      this.fingerMove(event);
      return;
    }
    if (this.owner.mode() === "relative") {
      if (document.pointerLockElement !== event.currentTarget || (event.movementX === 0 && event.movementY === 0 && event.button < 0)) return;
      this.owner.send("pointer", { dx: Math.round(event.movementX), dy: Math.round(event.movementY), buttons: this.names(event.buttons) });
    } else if (onPicture(event) || event.buttons !== 0) this.place(event, this.names(event.buttons));
  }

  /** @param {PointerEvent} event */
  up(event) {
    if (event.pointerType === "touch") this.fingerUp(event);
    else if (this.owner.active() && (onPicture(event) || this.owner.mode() === "relative")) this.place(event, this.names(event.buttons));
  }

  /** @param {WheelEvent} event */
  turned(event) {
    if (!this.owner.active() || !onPicture(event)) return;
    event.preventDefault();
    this.wheel += event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY / NOTCH : event.deltaY / (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 3 : 1);
    this.notches(event, this.names(event.buttons));
  }

  /** @param {{clientX: number, clientY: number}} at @param {string[]} buttons */
  notches(at, buttons) {
    const whole = Math.max(-MAX_WHEEL, Math.min(MAX_WHEEL, Math.trunc(this.wheel)));
    if (whole === 0) return;
    this.wheel = Math.abs(this.wheel) > MAX_WHEEL ? 0 : this.wheel - whole;
    this.place(at, buttons, whole);
  }

  // Fingers

  /** @param {PointerEvent} event */
  fingerDown(event) {
    this.fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    clearTimeout(this.timer);
    if (this.fingers.size === 1) {
      this.finger = { x: event.clientX, y: event.clientY, state: "tap" };
      const at = { clientX: event.clientX, clientY: event.clientY };
      this.timer = setTimeout(() => {
        if (this.finger.state !== "tap") return;
        this.finger.state = "pressed";
        this.place(at, ["right"]);
        this.place(at, []);
      }, LONG_PRESS);
    } else {
      if (this.finger.state === "drag") this.place(event, []);
      this.finger.state = this.fingers.size === 2 ? "wheel" : "none";
    }
  }

  /** @param {PointerEvent} event */
  fingerMove(event) {
    const before = this.fingers.get(event.pointerId);
    if (before === undefined) return;
    const far = Math.hypot(event.clientX - this.finger.x, event.clientY - this.finger.y) > SLACK;
    if (this.finger.state === "tap" && far) {
      clearTimeout(this.timer);
      this.finger.state = this.owner.mode() === "relative" ? "pad" : "drag";
      if (this.finger.state === "drag") this.place({ clientX: this.finger.x, clientY: this.finger.y }, ["left"]);
    }
    if (this.finger.state === "drag") this.place(event, ["left"]);
    if (this.finger.state === "pad") { // without a tablet the picture is a touchpad
      const [dx, dy] = [Math.round(event.clientX) - Math.round(before.x), Math.round(event.clientY) - Math.round(before.y)];
      if (dx !== 0 || dy !== 0) this.owner.send("pointer", { dx, dy, buttons: [] });
    }
    if (this.finger.state === "wheel") {
      this.wheel -= (event.clientY - before.y) / 2 / FINGER_NOTCH; // each of the two fingers moves
      this.notches({ clientX: this.finger.x, clientY: this.finger.y }, []);
    }
    this.fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  }

  /** @param {PointerEvent} event */
  fingerUp(event) {
    if (!this.fingers.delete(event.pointerId)) return;
    clearTimeout(this.timer);
    if (this.finger.state === "tap" && event.type === "pointerup") {
      this.place(event, []);
      this.place(event, ["left"]);
      this.place(event, []);
    } else if (this.finger.state === "drag") this.place(event, []);
    if (this.fingers.size === 0) this.finger.state = "none";
    else if (this.finger.state !== "wheel") this.finger.state = "done";
  }

  /** Forget what is down: the picture was left. */
  reset() {
    clearTimeout(this.timer);
    this.fingers.clear();
    this.finger.state = "none";
    this.wheel = 0;
  }
}

/** @param {Event} event @returns {boolean} whether it is on the picture, not on an overlay above it */
function onPicture(event) {
  const target = event.target;
  return target === event.currentTarget || (target instanceof HTMLElement && (["picture", "vmpointer", "held"].some((name) => target.classList.contains(name))));
}
