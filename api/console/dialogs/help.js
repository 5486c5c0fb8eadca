// The keys the console understands.

import { html } from '../lib/ui.js';
import { Dialog } from '../parts/dialog.js';

const KEYS = [
  ['/', 'Filter this list'],
  ['g o', 'Overview'], ['g h', 'Hosts'], ['g v', 'VMs'], ['g i', 'Images'], ['g d', 'Disks'], ['g n', 'Networks'],
  ['g m', 'Maintenance'], ['g p', 'Operations'], ['g e', 'Events'],
  ['n', 'Create a VM'],
  ['Esc', 'Close a dialog or menu'],
  ['Shift+Esc', 'Leave the serial terminal'],
  ['?', 'This list'],
];

export function HelpDialog({ close }) {
  return html`<${Dialog} title="Keyboard" close=${close}>
    <div class="dialog-body"><dl class="keys">${KEYS.map(([key, what]) => html`<div key=${key}>
      <dt>${key.split(' ').map((part) => html`<kbd>${part}</kbd>`)}</dt><dd>${what}</dd></div>`)}</dl></div>
  <//>`;
}
