/**
 * Keys and pointer of this page on their way to the VM: in their order, with few requests under way, and positions that
 * wait are merged. A slow way costs positions, never a key, a button or a notch of the wheel.
 */

const UNDER_WAY = 4;
/** Notches of the wheel in one request. */
const MAX_WHEEL = 15;

/** @typedef {{method: string, params: any}} Input */

export class InputQueue {
  /** @param {(method: string, params: any) => Promise<any>} send */
  constructor(send) {
    this.send = send;
    /** @type {Input[]} */
    this.waiting = [];
    this.underWay = 0;
  }

  /** @param {string} method @param {any} params */
  put(method, params) {
    const last = this.waiting.at(-1);
    if (last !== undefined && method === "pointer" && last.method === "pointer" && mergeable(last.params, params)) {
      last.params = merged(last.params, params);
    } else {
      this.waiting.push({ method, params });
    }
    this.pump();
  }

  /** Drop positions that wait: the picture was left. Keys that were pressed before are still sent. */
  leave() {
    this.waiting = this.waiting.filter((one) => one.method !== "pointer");
  }

  /** Drop all that waits: the connection ended. */
  clear() {
    this.waiting = [];
  }

  pump() {
    while (this.underWay < UNDER_WAY && this.waiting.length > 0) {
      const { method, params } = /** @type {Input} */ (this.waiting.shift());
      this.underWay += 1;
      const done = () => {
        this.underWay -= 1;
        this.pump();
      };
      this.send(method, params).then(done, done);
    }
  }
}

/** @param {any} before @param {any} after */
function mergeable(before, after) {
  if (Math.abs((before.wheel ?? 0) + (after.wheel ?? 0)) > MAX_WHEEL) return false;
  return String(before.buttons) === String(after.buttons) && ("x" in before) === ("x" in after) && ("dx" in before) === ("dx" in after);
}

/** @param {any} before @param {any} after */
function merged(before, after) {
  const both = { ...before, ...after };
  for (const name of ["dx", "dy", "wheel"]) if (name in before || name in after) both[name] = (before[name] ?? 0) + (after[name] ?? 0);
  return both;
}
