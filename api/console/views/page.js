// The head every view begins with.

import { html, useEffect } from '../lib/ui.js';

/** `children` are the view's own actions, at the right. */
export function PageHead({ title, note, children, crumb }) {
  useEffect(() => {
    document.title = `${typeof title === 'string' ? title : 'Godwit'} · Godwit`;
  }, [title]);
  return html`<div class="page-head">
    <div class="page-title">
      ${crumb && html`<a class="crumb" href=${crumb.href}>${crumb.text}</a><span class="crumb-sign" aria-hidden="true">/</span>`}
      <h1 tabindex="-1">${title}</h1>${note}
    </div>
    <div class="page-actions">${children}</div>
  </div>`;
}
