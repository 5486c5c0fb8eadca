// The few signs used beside words, drawn in the text's colour.

import { html } from '../lib/ui.js';

const PATHS = {
  overview: 'M3 9.5 8 4l5 5.500M4.500 8.500V13h7V8.500',
  hosts: 'M2.500 3.500h11v4h-11zM2.500 8.500h11v4h-11zM5 5.500h.01M5 10.500h.01',
  vms: 'M2.500 3.500h11v7h-11zM6 13h4M8 10.500V13',
  maintenance: 'M9.500 6.500 13 3a3 3 0 0 1-4 4L5 11.500a1.400 1.400 0 0 1-2-2L7.500 5a3 3 0 0 1 4-2.500L9 5z',
  operations: 'M3 4.500h7M3 8h10M3 11.500h5',
  events: 'M2.500 8.500h2.500L7 4l2.500 8L11 8.500h2.500',
  sun: 'M8 5.200a2.800 2.800 0 1 0 0 5.600 2.800 2.800 0 0 0 0-5.600zM8 1.500v1.500M8 13v1.500M1.500 8H3M13 8h1.500M3.400 3.400l1 1M11.600 11.600l1 1M12.600 3.400l-1 1M4.400 11.600l-1 1',
  moon: 'M13 9.500A5.500 5.500 0 0 1 6.500 3 5.500 5.500 0 1 0 13 9.500z',
  system: 'M8 2.500a5.500 5.500 0 1 0 0 11zM8 2.500a5.500 5.500 0 0 1 0 11',
  more: 'M3.500 8h.01M8 8h.01M12.500 8h.01',
  arrow: 'M2.500 8h10M9 4.500 12.500 8 9 11.500',
  check: 'M3 8.500 6.500 12 13 4.500',
  alert: 'M8 2.500 14 13H2zM8 6.500v3M8 11.300v.01',
  close: 'M4 4l8 8M12 4l-8 8',
  plus: 'M8 3v10M3 8h10',
  down: 'M4.500 6.500 8 10l3.500-3.500',
  copy: 'M5.500 5.500h7v7h-7zM3.500 10.500v-7h7',
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
    <path class="logo-body" d="M1 15.200 11.600 14c1-2.200 3-3.500 5.200-3.500 3 0 5.400 1.700 7.200 4.200L31 20l-7.600-1.200c-1.300 1.900-3.400 3-6 3-3.300 0-5.400-2-5.400-5.400L1 15.200z" />
    <path class="logo-wing" d="M15 15.500c2-5.500 5.500-9.300 10.500-11-.6 5-2.600 9-6 12z" />
  </svg>`;
}
