-- What every page of the site gets, from one place: a line to download and run its notebook, one that names what it exports, numbered equations, tables and formulas
-- that scroll by themselves, links to equations, places to link to at exported functions, links within the site that stay on the host one is on.
-- Quarto says which notebook it renders; without Quarto (tests/test_site.py) the metadata `notebook` does.
local notebook, run, home = nil, {}, nil


local function about(meta)
  local text = pandoc.utils.stringify
  for key, value in pairs(meta.notebooks or {}) do run[key] = text(value) end
  home = run.site and run.site .. "/"
  if quarto and quarto.project.directory then
    notebook = pandoc.path.make_relative(quarto.doc.input_file, quarto.project.directory)
  elseif meta.notebook then
    notebook = text(meta.notebook)
  end
  notebook = notebook and notebook:gsub("\\", "/")
end


local function up() return notebook:find("/") and "../" or "" end


-- 3_training/05_train.ipynb -> tiny_llm.training.train
local function module()
  local part, name = (notebook or ""):match("^%d_(%w+)/%d+%a?_([%w_]+)%.ipynb$")
  if part then return "tiny_llm." .. part .. "." .. name end
  name = (notebook or ""):match("^%d+%a?_([%w_]+)%.ipynb$")
  return name and "tiny_llm." .. name
end


-- MathML has no \tag, and Pandoc drops it without a word: the number of an equation stands beside it. A formula within a line cannot
-- break, so a long one may scroll.
local function equation(el)
  if el.mathtype ~= "DisplayMath" then return #el.text > 40 and pandoc.Span({el}, {class = "long-formula"}) or nil end
  local number
  el.text = el.text:gsub("%s*\\tag%s*{(.-)}", function(n) number = n; return "" end)
  local parts = pandoc.Inlines{pandoc.Span({el}, {class = "formula"})}
  if number then parts:insert(pandoc.Span("(" .. number .. ")", {id = "equation-" .. number, class = "equation-number"})) end
  return pandoc.Span(parts, {class = "equation"})
end


local function scrolling(el)
  local first = #el.head.rows > 0 and pandoc.utils.stringify(el.head.rows[1].cells[1]) or ""
  return pandoc.Div({el}, {class = first == "notebook" and "wide-table course" or "wide-table"})
end


-- nbdev links `train` to train.html#train, and `Run.plot` to run.html#run.plot.
local function defined(code)
  local names, class = {}, nil
  for line in code:gmatch("[^\n]+") do
    class = line:match("^class%s+([%w_]+)") or (line:match("^%S") and "") or class
    local name = line:match("^class%s+([%w_]+)") or line:match("^def%s+([%w_]+)") or line:match("^async%s+def%s+([%w_]+)")
    local method = class ~= "" and class and (line:match("^    def%s+([%w_]+)") or line:match("^    async%s+def%s+([%w_]+)"))
    if name then names[#names + 1] = name:lower() end
    if method then names[#names + 1] = (class .. "." .. method):lower() end
  end
  return names
end


-- What a reader can import: the public functions and classes, `Run.plot` where one is patched into a class; each with the place to link to.
local exported = {}
local function export(code)
  for line in code:gmatch("[^\n]+") do
    local name = line:match("^class%s+([%w_]+)") or line:match("^def%s+([%w_]+)") or line:match("^async%s+def%s+([%w_]+)")
    local of = line:match("^[async ]*def%s+[%w_]+%(self:%s*([%w_]+)")
    if name and name:sub(1, 1) ~= "_" then exported[#exported + 1] = {(of and of .. "." or "") .. name, name:lower()} end
  end
end


local function places(doc)
  local taken = {}
  doc:walk{
    Header = function(el) taken[el.identifier] = true end,
    Div = function(el) taken[el.identifier] = true end,
  }
  return doc:walk{CodeBlock = function(el)
    if #el.classes == 0 then
      for line in el.text:gmatch("[^\n]+") do
        if #line > 110 then el.classes = {"prose"} end   -- output that is text, such as a story: its lines are broken
      end
      return el
    end
    if el.attributes["code-summary"] ~= "Exported source" then return end
    el.attributes["code-summary"] = module() or el.attributes["code-summary"]
    export(el.text)
    local marks = pandoc.Inlines{}
    for _, name in ipairs(defined(el.text)) do
      if not taken[name] then marks:insert(pandoc.Span({}, {id = name})) end
      taken[name] = true
    end
    return #marks > 0 and {pandoc.Plain(marks), el} or el
  end}
end


-- "(1.02.3)" in a text becomes a link to that equation, if it stands on this page.
local function references(doc)
  local here = {}
  doc:walk{Span = function(el)
    if el.classes:includes("equation-number") then here[el.identifier:gsub("^equation%-", "")] = true end
  end}
  local function linked(el)
    local parts, at = pandoc.Inlines{}, 1
    for first, number, last in el.text:gmatch("()%((%d%.%d%d%.%d+%a?)%)()") do
      if here[number] then
        if first > at then parts:insert(pandoc.Str(el.text:sub(at, first - 1))) end
        parts:insert(pandoc.Link("(" .. number .. ")", "#equation-" .. number, "", {class = "to-equation"}))
        at = last
      end
    end
    if at == 1 then return end
    if at <= #el.text then parts:insert(pandoc.Str(el.text:sub(at))) end
    return parts
  end
  local function bare(el)
    return el:walk{Link = function(l) if l.classes:includes("to-equation") then return l.content end end}
  end
  doc = doc:walk{Str = linked}
  return doc:walk{Link = bare, Header = bare, Span = function(el) if el.classes:includes("equation-number") then return bare(el) end end}
end


local function link(el)
  if not (home and notebook and el.target:sub(1, #home) == home) then return end
  el.target = up() .. el.target:sub(#home + 1)
  return el
end


local function launch(doc)
  if not (notebook and run.repo) or notebook == "index.ipynb" then return doc end
  local at = run.repo .. "/blob/" .. run.version .. "/nbs/" .. notebook
  local file = notebook:match("[^/]+$")
  local binder = "https://mybinder.org/v2/gh/" .. run.repo .. "/" .. run.version .. "?labpath=nbs/" .. notebook
  local links = pandoc.Inlines{
    pandoc.Link("Download this notebook", up() .. "download/" .. notebook, "", {class = "bi bi-download", download = file}), pandoc.Space(),
    pandoc.Link("Open in Colab", "https://colab.research.google.com/github/" .. at, "The version " .. run.version .. " of this notebook in Google Colab", {class = "bi bi-play-circle"}),
    pandoc.Space(), pandoc.Link("Open in Binder", binder, "The version " .. run.version .. " of this notebook on mybinder.org", {class = "bi bi-play-circle"}),
  }
  local first = "!pip install git+https://github.com/" .. run.repo .. "@" .. run.version
  local note = pandoc.Inlines{pandoc.Str("Version " .. run.version .. ". In Colab, run this first: "), pandoc.Code(first)}
  doc.blocks:insert(1, pandoc.Div({pandoc.Para(links), pandoc.Para(note)}, {class = "launch"}))
  if #exported > 0 then
    local names = pandoc.Inlines{pandoc.Str("Exports "), pandoc.Code(module()), pandoc.Str(": ")}
    for i, found in ipairs(exported) do
      if i > 1 then names:extend{pandoc.Str(","), pandoc.Space()} end
      names:insert(pandoc.Link({pandoc.Code(found[1])}, "#" .. found[2]))
    end
    doc.blocks:insert(2, pandoc.Div({pandoc.Para(names)}, {class = "exports"}))
  end
  return doc
end


return {{Meta = about}, {Pandoc = places}, {Math = equation, Table = scrolling, Link = link}, {Pandoc = references}, {Pandoc = launch}}
