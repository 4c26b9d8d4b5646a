-- MathML has no \tag: Pandoc drops it without a word. This writes the number of an equation out, "(3.2)" at its right.
function Math(el)
  if el.mathtype == "DisplayMath" then
    el.text = el.text:gsub("%s*\\tag%s*{(.-)}", function(n) return "\\qquad\\text{(" .. n .. ")}" end)
    return el
  end
end
