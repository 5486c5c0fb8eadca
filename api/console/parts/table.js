// Sorting, filtering and showing long lists piece by piece.

import { html, useState } from '../lib/ui.js';
import { Icon } from './icon.js';

const STEP = 200;

/** `[sorted(items), header(name, label, class)]` over `keys`: name → value of an item. */
export function useSort(keys, first, firstDirection = 1) {
  const [by, setBy] = useState({ name: first, direction: firstDirection });
  const compare = (a, b) => {
    const [left, right] = [keys[by.name](a) ?? '', keys[by.name](b) ?? ''];
    const order = typeof left === 'number' && typeof right === 'number' ? left - right : String(left).localeCompare(String(right), 'en', { numeric: true });
    return order * by.direction;
  };
  const turn = (name) => setBy({ name, direction: by.name === name ? -by.direction : 1 });
  const header = (name, label, align = '') => {
    const active = by.name === name;
    return html`<th scope="col" class=${align} aria-sort=${active ? (by.direction > 0 ? 'ascending' : 'descending') : null}>
      <button type="button" class="sort" onClick=${() => turn(name)}>${label}${active && html`<span class="sort-sign"
        aria-hidden="true">${by.direction > 0 ? '▲' : '▼'}</span>`}</button>
    </th>`;
  };
  return [(items) => [...items].sort(compare), header];
}

/** `[items to show, button for more]`: at most STEP at first, so that thousands of rows stay quick. */
export function usePieces(items) {
  const [limit, setLimit] = useState(STEP);
  const rest = items.length - limit;
  const more = rest > 0 && html`<button type="button" class="button more"
    onClick=${() => setLimit(limit + STEP)}>Show ${Math.min(STEP, rest)} more of ${rest}</button>`;
  return [items.slice(0, limit), more];
}

/** The text filter of a view; `/` puts the focus here. */
export function FilterBox({ value, onInput, label }) {
  return html`<span class="filter">
    <input type="search" data-filter placeholder="${label} ( / )" aria-label=${label} value=${value}
      onInput=${(event) => onInput(event.target.value)} data-testid="filter" />
  </span>`;
}

/** Whether every word of `query` occurs in one of the texts. */
export function matches(query, ...texts) {
  const hay = texts.filter(Boolean).join(' ').toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => hay.includes(word));
}

/** A row of exclusive choices, such as severities. `options`: [[value, label, count]]. */
export function Choice({ label, options, value, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>
    ${options.map(([key, text, number]) => html`<button key=${key} type="button" aria-pressed=${String(value === key)}
      data-testid="choice-${key}" onClick=${() => onChange(key)}>${text}${number !== undefined && html`<span
      class="count">${number}</span>`}</button>`)}
  </div>`;
}

/** A link that looks like the name of a thing. */
export function More({ href, children }) {
  return html`<a class="more-link" href=${href}>${children}<${Icon} name="arrow" /></a>`;
}
