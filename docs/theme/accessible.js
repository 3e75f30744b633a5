// Accessibility of what the theme adds: readers with a keyboard can scroll wide tables, and skip anchors without text.
function mark() {
  for (const region of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) region.tabIndex = 0;
  for (const anchor of document.querySelectorAll("a[id^=__codelineno]:not([aria-hidden])")) {
    anchor.tabIndex = -1;
    anchor.ariaHidden = "true";
  }
}
new MutationObserver(mark).observe(document.documentElement, { childList: true, subtree: true });
mark();
