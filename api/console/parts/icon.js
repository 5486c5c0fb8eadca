// The few signs used beside words, drawn in the text's colour.

import { html } from '../lib/ui.js';

const PATHS = {
  overview: 'M3 9.5 8 4l5 5.5M4.5 8.5V13h7V8.5',
  hosts: 'M2.5 3.5h11v4h-11zM2.5 8.5h11v4h-11zM5 5.5h.01M5 10.5h.01',
  vms: 'M2.5 3.5h11v7h-11zM6 13h4M8 10.5V13',
  maintenance: 'M9.5 6.5 13 3a3 3 0 0 1-4 4L5 11.5a1.4 1.4 0 0 1-2-2L7.5 5a3 3 0 0 1 4-2.5L9 5z',
  images: 'M8 2.5a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11zM8 6.7a1.3 1.3 0 1 0 0 2.6 1.3 1.3 0 0 0 0-2.6z',
  disks: 'M3 4.5c0-2.7 10-2.7 10 0s-10 2.7-10 0zM3 4.5v7c0 2.7 10 2.7 10 0v-7M3 8c0 2.7 10 2.7 10 0',
  networks: 'M6 2.5h4v3H6zM2.5 10.5h4v3h-4zM9.5 10.5h4v3h-4zM8 5.5V8M4.5 10.5V8h7v2.5',
  operations: 'M3 4.5h7M3 8h10M3 11.5h5',
  events: 'M2.5 8.5h2.5L7 4l2.5 8L11 8.5h2.5',
  sun: 'M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6zM8 1.5v1.5M8 13v1.5M1.5 8H3M13 8h1.5M3.4 3.4l1 1M11.6 11.6l1 1M12.6 3.4l-1 1M4.4 11.6l-1 1',
  moon: 'M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z',
  system: 'M8 2.5a5.5 5.5 0 1 0 0 11zM8 2.5a5.5 5.5 0 0 1 0 11',
  more: 'M3.5 8h.01M8 8h.01M12.5 8h.01',
  arrow: 'M2.5 8h10M9 4.5 12.5 8 9 11.5',
  check: 'M3 8.5 6.5 12 13 4.5',
  alert: 'M8 2.5 14 13H2zM8 6.5v3M8 11.3v.01',
  close: 'M4 4l8 8M12 4l-8 8',
  plus: 'M8 3v10M3 8h10',
  down: 'M4.5 6.5 8 10l3.5-3.5',
  copy: 'M5.5 5.5h7v7h-7zM3.5 10.5v-7h7',
};

/** A 16-pixel line icon; decorative, so it has no name of its own. */
export function Icon({ name }) {
  return html`<svg class="icon icon-${name}" viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor"
    stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">
    <path d=${PATHS[name]} /></svg>`;
}

/** The bird. */
export function Logo() {
  return html`<svg class="logo" viewBox="0 0 32 32" width="26" height="26" aria-hidden="true">
    <path class="logo-body" d="M1 15.2 11.6 14c1-2.2 3-3.5 5.2-3.5 3 0 5.4 1.7 7.2 4.2L31 20l-7.6-1.2c-1.3 1.9-3.4 3-6 3-3.3 0-5.4-2-5.4-5.4L1 15.2z" />
    <path class="logo-wing" d="M15 15.5c2-5.5 5.5-9.3 10.5-11-.6 5-2.6 9-6 12z" />
  </svg>`;
}
