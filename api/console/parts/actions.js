// The buttons for what can be asked of something: the main ones at hand, the others in a menu.

import { html } from '../lib/ui.js';
import { Menu } from './menu.js';

/** `intents` as `intents.js` gives them; `name` is what they act on. */
export function Actions({ intents, name, small }) {
  const main = intents.filter((intent) => intent.main);
  const others = intents.filter((intent) => !intent.main);
  return html`<span class="actions">
    ${main.map((intent) => html`<button key=${intent.id} type="button" class="button ${small ? 'button-small' : ''}"
      aria-label="${intent.label.replace('…', '')} ${name}" data-testid="action-${intent.id}"
      onClick=${intent.run}>${intent.label}</button>`)}
    <${Menu} label="More actions for ${name}" testid="actions-${name}" items=${others.map((intent) => ({ ...intent, testid: `action-${intent.id}` }))} />
  </span>`;
}
