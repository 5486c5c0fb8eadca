// Text to be taken elsewhere.

import { html, useState } from '../lib/ui.js';
import { Icon } from './icon.js';

/** A command or value with a button that copies it. */
export function CopyField({ text, label, testid }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  // The clipboard exists only in a secure context; elsewhere the text is selected by hand.
  return html`<div class="copy">
    <pre tabindex="0" aria-label=${label} data-testid=${testid}>${text}</pre>
    ${navigator.clipboard && html`<button type="button" class="button" onClick=${copy}>
      <${Icon} name=${copied ? 'check' : 'copy'} />${copied ? 'Copied' : 'Copy'}</button>`}
  </div>`;
}
