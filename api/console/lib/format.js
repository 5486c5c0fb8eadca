// Numbers and times as an operator reads them. Missing values become an en dash.

const NONE = '–';
const KIB = 1024;
const MIB = KIB * KIB;
const GIB = MIB * KIB;
const TIB = GIB * KIB;

const missing = (value) => value === null || value === undefined || Number.isNaN(value);

/** At most three digits that matter: 0.42, 7.3, 118. */
function digits(value) {
  if (value >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1).replace(/\.0$/, '') : value.toFixed(value < 1 ? 2 : 1);
}

export function bytes(value) {
  if (missing(value)) return NONE;
  if (value >= TIB) return `${(value / TIB).toFixed(1)} TiB`;
  if (value >= GIB) return `${(value / GIB).toFixed(1)} GiB`;
  if (value >= 10 * MIB) return `${Math.round(value / MIB)} MiB`;
  if (value >= MIB) return `${(value / MIB).toFixed(1)} MiB`;
  if (value >= KIB) return `${Math.round(value / KIB)} KiB`;
  return `${Math.round(value)} B`;
}

export function mib(value) {
  if (missing(value)) return NONE;
  return value === 0 ? '0 MiB' : bytes(value * MIB);
}

/** Always in MiB, so that a running count does not jump between units. */
export function inMib(value) {
  return missing(value) ? NONE : (value / MIB).toLocaleString('en', { maximumFractionDigits: value < 10 * MIB ? 1 : 0 });
}

/** One decimal, so that a column of rates lines up. */
export function rate(value) {
  if (missing(value)) return NONE;
  return `${value / MIB >= 1000 ? Math.round(value / MIB) : (value / MIB).toFixed(1)} MiB/s`;
}

export function percent(value) {
  return missing(value) ? NONE : `${value < 10 && value > 0 ? value.toFixed(1) : Math.round(value)} %`;
}

export function milliseconds(value) {
  if (missing(value)) return NONE;
  if (value >= 10_000) return seconds(value / 1000);
  return value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${digits(Math.round(value * 10) / 10)} ms`;
}

export function seconds(value) {
  if (missing(value)) return NONE;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, '0')} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, '0')} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

const clock = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit' });
const day = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short' });

/** Clock time, with the day when it is not today. */
export function time(value) {
  if (missing(value)) return NONE;
  const at = new Date(value);
  const today = at.toDateString() === new Date().toDateString();
  return today ? clock.format(at) : `${day.format(at)} ${clock.format(at)}`;
}

export function ago(value, now = Date.now()) {
  if (missing(value)) return NONE;
  const passed = (now - new Date(value)) / 1000;
  if (passed < 2) return 'just now';
  return passed < 60 ? `${Math.round(passed)} s ago` : `${seconds(passed).replace(/ \d\d s$/, '')} ago`;
}

/** Time between two moments; `to` null means until now. */
export function between(from, to, now = Date.now()) {
  return missing(from) ? NONE : seconds(Math.max(0, (to ? new Date(to) : now) - new Date(from)) / 1000);
}

/** "1 host", "3 hosts". */
export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

/** `awaiting_fence` → "awaiting fence". */
export function words(name) {
  return missing(name) ? NONE : String(name).replaceAll(/[_-]/g, ' ');
}

/** The same with a capital. */
export function sentence(name) {
  return capital(words(name));
}

/** Text as it is, with a capital. */
export function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
