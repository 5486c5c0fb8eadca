// The one place that names the rendering library; every other module imports from here.
export { h, html, render, createContext, useContext, useEffect, useLayoutEffect, useMemo, useRef, useState, useErrorBoundary } from '../vendor/preact/htm-preact.js';

/** Joins the class names that are set. */
export function classes(...names) {
  return names.filter(Boolean).join(' ');
}
