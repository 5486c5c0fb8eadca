// What a migration would do if it began now, as its dry run says.

import { classes, html } from '../lib/ui.js';
import { bytes, capital, mib, milliseconds, percent, rate, seconds } from '../lib/format.js';

const VERDICTS = {
  converges: 'It converges',
  goes_ahead: 'It goes ahead of its memory',
  will_not_converge: 'It will not converge under the limit',
};

const BASES = { lanes: 'earlier moves between these hosts', pair: 'earlier moves between these hosts', pool: 'earlier moves in the pool' };

export function Forecast({ forecast, busy }) {
  const stays = forecast.verdict === 'will_not_converge';
  const measured = forecast.measured;
  const figures = [
    [stays ? 'Given up after' : 'Time', seconds(forecast.seconds)],
    ['To send', mib(forecast.mib)],
    forecast.disk_bytes > 0 && ['Disks', `at most ${bytes(forecast.disk_bytes)}`],
    ['Blackout', milliseconds(forecast.blackout_ms)],
    forecast.throttle_percent > 0 && ['Guest slowed by', percent(forecast.throttle_percent)],
    ['Dirty rate', rate(measured.dirty_bytes_per_s)],
    ['Link', rate(measured.bytes_per_s)],
  ].filter(Boolean);
  return html`<section class=${classes('note', stays && 'note-warn')} data-testid="forecast" data-verdict=${forecast.verdict} aria-busy=${busy}>
    <strong>${VERDICTS[forecast.verdict] ?? forecast.verdict}</strong>
    ${forecast.because && html`<p>${capital(forecast.because.detail)}.</p>`}
    <dl class="figures">${figures.map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>
    ${forecast.options.length > 0 && html`<p>Any one of these would help:</p>
      <ul>${forecast.options.map((option) => html`<li key=${option.kind}>${capital(option.detail)}</li>`)}</ul>`}
    <p class="quiet">${basis(measured)}</p>
  </section>`;
}

function basis(measured) {
  const dirty = measured.dirty_from === 'sampled' ? 'The guest was watched just now' : 'The dirty rate is from an earlier sample';
  const last = measured.dirty_series.at(-1);
  const set = last ? `: it dirtied ${bytes(last.bytes)} in ${milliseconds(last.after_us / 1000)}` : '';
  const link = BASES[measured.bytes_per_s_from];
  return `${dirty}${set}. ${link ? `The link is known from ${link}.` : 'The rate of the link is assumed: nothing has been measured yet.'}`;
}
