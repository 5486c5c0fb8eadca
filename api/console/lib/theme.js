// Light or dark: the system's choice until the operator makes another.

import { useState } from './ui.js';

const KEY = 'godwit.theme';
const CHOICES = ['system', 'light', 'dark'];

function chosen() {
  const kept = localStorage.getItem(KEY);
  return CHOICES.includes(kept) ? kept : 'system';
}

function apply(choice) {
  if (choice === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

/** Applies what was chosen earlier. */
export function applyTheme() {
  apply(chosen());
}

/** `[choice, chooseNext]`. */
export function useTheme() {
  const [choice, setChoice] = useState(chosen);
  const chooseNext = () => {
    const next = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    localStorage.setItem(KEY, next);
    apply(next);
    setChoice(next);
  };
  return [choice, chooseNext];
}
