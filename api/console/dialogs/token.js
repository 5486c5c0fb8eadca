// Asks for the API token when the server demands one.

import { html, useLayoutEffect, useState } from '../lib/ui.js';
import { demand, giveToken, onDemand } from '../lib/auth.js';
import { Dialog } from '../parts/dialog.js';
import { Field } from '../parts/field.js';

/** Shows the prompt whenever a request was answered 401; once per page. */
export function TokenPrompt() {
  const [asked, setAsked] = useState(demand());
  const [value, setValue] = useState('');
  useLayoutEffect(() => onDemand(() => setAsked(demand())), []);
  if (!asked) return null;
  const submit = (event) => {
    event.preventDefault();
    giveToken(value.trim());
    setValue('');
  };
  return html`<${Dialog} title="This server asks for a token" testid="token-dialog">
    <form onSubmit=${submit} class="dialog-form">
      <div class="dialog-body">
        <p class="lead">The server printed an API token when it first started. It is kept until this tab is closed.</p>
        <${Field} label="API token" error=${asked.rejected ? 'the server does not accept the token given before' : null} wide>
          <input type="password" value=${value} required autofocus autocomplete="off" spellcheck=${false} data-testid="token-input"
            onInput=${(event) => setValue(event.target.value)} />
        <//>
      </div>
      <footer class="dialog-foot"><button type="submit" class="button button-primary" data-testid="token-submit">Sign in</button></footer>
    </form>
  <//>`;
}
