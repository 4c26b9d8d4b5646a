-- Run by Quarto when the pages are written (post-render), in the folder _proc.
-- 1. Quarto gives a page whose notebook has an HTML output, even a plain table, RequireJS and jQuery from another host. Nothing here needs them.
-- 2. A page offers its notebook as a download: that is the one in nbs/, not what nbdev made of it for the page.
-- 3. The page *Talk to it* is no notebook (nbs/_tools/talk.py writes it), so that Quarto knows of no such page: links to it are made relative here.
local function read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read("a")
  f:close()
  return text
end

local function write(path, text)
  local f = assert(io.open(path, "wb"))
  f:write(text)
  f:close()
end

for page in (os.getenv("QUARTO_PROJECT_OUTPUT_FILES") or ""):gmatch("[^\r\n]+") do
  if page:match("%.html$") then
    local old = read(page)
    local new = old:gsub('<script[^>]-src="https?://[^>]->%s*</script>\n?', ""):gsub("<script[^>]->define%('jquery'.-</script>\n?", "")
    local _, deep = (page:gsub("\\", "/"):match("_docs/(.*)$") or page):gsub("/", "")
    new = new:gsub('href="[./]*talk/index%.html"', 'href="' .. ("../"):rep(deep) .. 'talk/index.html"')
    if new ~= old then write(page, new) end
    local notebook = new:match('href="[./]*download/([^"]+%.ipynb)"')
    if notebook then
      local copy = os.getenv("QUARTO_PROJECT_OUTPUT_DIR") .. "/download/" .. notebook
      pandoc.system.make_directory(pandoc.path.directory(copy), true)
      write(copy, read("../nbs/" .. notebook))
    end
  end
end
return {}
