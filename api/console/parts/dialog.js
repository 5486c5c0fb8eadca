// Modal dialogs: the native element traps the focus, closes on Esc and gives the focus back.

import { classes, html, useLayoutEffect, useRef, useState } from '../lib/ui.js';
import { Icon } from './icon.js';

let stack = [];
let redraw = () => {};
let nextKey = 1;

/** Opens `Component` as a dialog; it gets `props` and `close(result)`. Resolves with the result. */
export function openDialog(Component, props = {}) {
  return new Promise((resolve) => {
    const entry = { key: nextKey++, Component, props };
    entry.close = (result) => {
      stack = stack.filter((other) => other !== entry);
      redraw();
      resolve(result);
    };
    stack = [...stack, entry];
    redraw();
  });
}

/** Whether a dialog is open; keyboard shortcuts rest meanwhile. */
export const dialogIsOpen = () => stack.length > 0;

/** Where dialogs appear; once per page. */
export function DialogHost() {
  const [, drawn] = useState(0);
  redraw = () => drawn((count) => count + 1);
  return stack.map(({ key, Component, props, close }) => html`<${Component} key=${key} ...${props} close=${close} />`);
}

/** The frame of a dialog. Without `close` it cannot be dismissed. */
export function Dialog({ title, close, children, width = 'normal', testid }) {
  const element = useRef(null);
  useLayoutEffect(() => {
    const dialog = element.current;
    dialog.showModal();
    return () => dialog.close();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    close?.();
  };
  return html`<dialog ref=${element} class=${classes('dialog', `dialog-${width}`)} aria-labelledby="dialog-title" data-testid=${testid} onCancel=${cancel}>
    <header class="dialog-head">
      <h2 id="dialog-title">${title}</h2>
      ${close && html`<button type="button" class="button-icon" aria-label="Close" onClick=${() => close()}><${Icon} name="close" />
        </button>`}
    </header>
    ${children}
  </dialog>`;
}

/** Asks before something that cannot be taken back; resolves to whether to go on. */
export function confirm({ title, text, verb, danger }) {
  return openDialog(Confirmation, { title, text, verb, danger });
}

function Confirmation({ title, text, verb, danger, close }) {
  return html`<${Dialog} title=${title} close=${close} testid="confirm">
    <div class="dialog-body"><p>${text}</p></div>
    <footer class="dialog-foot">
      <button type="button" class="button" autofocus onClick=${() => close(false)}>Keep as it is</button>
      <button type="button" class=${classes('button', danger ? 'button-danger' : 'button-primary')} data-testid="confirm-yes"
        onClick=${() => close(true)}>${verb}</button>
    </footer>
  <//>`;
}
