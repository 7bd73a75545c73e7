/** Numbers as text: SI units, as the command line prints them. Number and unit are joined by a space that never breaks. */

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
const JOINED = "\u00a0";

/** @param {number} count of bytes @returns {string} `84.2 MB` */
export function bytes(count) {
  let unit = 0;
  let value = Math.max(0, Number(count) || 0);
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${grouped(value.toFixed(unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2))}${JOINED}${UNITS[unit]}`;
}

/** @param {number} count of bytes per second @returns {string} `84.2 MB/s` */
export function rate(count) {
  return `${bytes(count)}/s`;
}

/** @param {number | string} number @returns {string} with narrow spaces between thousands */
export function grouped(number) {
  const [whole, part] = String(number).split(".");
  const text = whole.replace(/\B(?=(\d{3})+$)/g, "\u202f");
  return part === undefined ? text : `${text}.${part}`;
}

/** @param {number} seconds @returns {string} `41 s`, `18 min`, `2 h 06 min` */
export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole}${JOINED}s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}${JOINED}min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours}${JOINED}h${JOINED}${String(minutes % 60).padStart(2, "0")}${JOINED}min`;
  return `${Math.floor(hours / 24)}${JOINED}d`;
}

/** @param {number} seconds since 1970 @returns {string} the time of the day here: `18:42:07` */
export function clock(seconds) {
  const when = new Date(seconds * 1000);
  return [when.getHours(), when.getMinutes(), when.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

/** @param {number} seconds since 1970 @param {number} now @returns {string} `09:14`, `24 Nov` of another day, `Nov 2024` of long ago */
export function day(seconds, now) {
  const when = new Date(seconds * 1000);
  if (when.toDateString() === new Date(now * 1000).toDateString()) return clock(seconds).slice(0, 5);
  if (Math.abs(now - seconds) < 300 * 86400) return when.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return when.toLocaleDateString("en-GB", { month: "short", year: "numeric" });
}
