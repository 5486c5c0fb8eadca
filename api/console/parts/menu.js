// A button that opens a short list of actions.

import { classes, html, useRef } from '../lib/ui.js';
import { Icon } from './icon.js';

let nextId = 1;

/** `items`: `{label, run, danger, disabled, why, testid}`; nothing is drawn when there are none. */
export function Menu({ label, items, testid }) {
  const id = useRef(null);
  id.current ??= `menu-${nextId++}`;
  const button = useRef(null);
  const list = useRef(null);
  if (items.length === 0) return null;

  const place = (event) => {
    if (event.newState !== 'open') return;
    const anchor = button.current.getBoundingClientRect();
    const menu = list.current;
    const height = menu.offsetHeight;
    const below = anchor.bottom + 4 + height < innerHeight;
    menu.style.top = `${below ? anchor.bottom + 4 : Math.max(4, anchor.top - 4 - height)}px`;
    menu.style.left = `${Math.max(4, anchor.right - menu.offsetWidth)}px`;
    menu.querySelector('button:not(:disabled)')?.focus();
  };
  const walk = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const entries = [...list.current.querySelectorAll('button:not(:disabled)')];
    const at = entries.indexOf(document.activeElement);
    entries[(at + step + entries.length) % entries.length]?.focus();
  };
  const choose = (item) => {
    list.current.hidePopover();
    item.run();
  };
  return html`<span class="menu-anchor">
    <button ref=${button} type="button" class="button-icon" aria-label=${label} aria-haspopup="menu" popovertarget=${id.current} data-testid=${testid}>
      <${Icon} name="more" /></button>
    <div ref=${list} id=${id.current} class="menu" role="menu" aria-label=${label} popover="auto" onToggle=${place} onKeyDown=${walk}>
      ${items.map((item) => html`<button key=${item.label} type="button" role="menuitem" class=${classes(item.danger && 'danger')}
        disabled=${item.disabled} title=${item.why} data-testid=${item.testid} onClick=${() => choose(item)}>${item.label}</button>`)}
    </div>
  </span>`;
}
