//! Finds every path in a file that names another part of the crate, and holds it to the table.

use std::collections::BTreeMap;

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::{Breach, LAYERS, OWNED_CRATES, ROOTS, layer_of, line, module_of, parse};

/// What `lib.rs` gives a shorter name at the crate's root, and where each stands: `Error` is `error::Error`.
pub type RootNames = BTreeMap<String, Vec<String>>;

pub fn root_names(lib: &str) -> RootNames {
    let mut names = RootNames::new();
    for item in parse("lib.rs", lib).items {
        let syn::Item::Use(item) = item else { continue };
        for import in flatten(&item.tree) {
            let path: Vec<String> = import.path.iter().map(|(name, _)| name.clone()).collect();
            let inside = path.iter().position(|name| name != "crate" && name != "self").unwrap_or(path.len());
            names.insert(import.name, path[inside..].to_vec());
        }
    }
    names
}

/// One name that a `use` item brings in.
pub struct Import {
    /// The path's segments and the line of each. Empty where the tree began with a bare `*` or `self`.
    pub path: Vec<(String, usize)>,
    /// What it is called here; `*` for a glob.
    pub name: String,
}

/// Spells out a `use` tree: `a::{b, c::{self, d as e}, f::*}` is `a::b`, `a::c`, `a::c::d` and `a::f::*`.
pub fn flatten(tree: &syn::UseTree) -> Vec<Import> {
    fn walk(tree: &syn::UseTree, path: &[(String, usize)], out: &mut Vec<Import>) {
        let with = |ident: &syn::Ident| {
            let mut path = path.to_vec();
            // A trailing `self` stands for the path before it; `use self as x` has nothing before it.
            if ident != "self" || path.is_empty() {
                path.push((ident.to_string(), line(ident.span())));
            }
            path
        };
        match tree {
            syn::UseTree::Path(part) => {
                let mut path = path.to_vec();
                path.push((part.ident.to_string(), line(part.ident.span())));
                walk(&part.tree, &path, out);
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| walk(tree, path, out)),
            syn::UseTree::Glob(_) => out.push(Import { path: path.to_vec(), name: "*".into() }),
            syn::UseTree::Name(part) => {
                let path = with(&part.ident);
                let name = path.last().map(|last| last.0.clone()).unwrap_or_default();
                out.push(Import { path, name });
            }
            syn::UseTree::Rename(part) => {
                out.push(Import { path: with(&part.ident), name: part.rename.to_string() });
            }
        }
    }
    let mut out = Vec::new();
    walk(tree, &[], &mut out);
    out
}

fn is_root_word(name: &str) -> bool {
    matches!(name, "crate" | "self" | "super" | "bitfit")
}

/// Walks a file and reports every path that leaves its layer against the table.
struct Imports<'a> {
    file: &'a str,
    names: &'a RootNames,
    /// Where we are, from the crate's root; inline modules count.
    module: Vec<String>,
    /// Strings in attributes can be paths: `#[serde(with = "crate::x")]`.
    in_attribute: bool,
    breaches: Vec<Breach>,
}

pub fn check_imports(file: &str, source: &str, names: &RootNames) -> Vec<Breach> {
    let module = module_of(file);
    let mut walk = Imports { file, names, module, in_attribute: false, breaches: Vec::new() };
    walk.visit_file(&parse(file, source));
    walk.breaches
}

impl Imports<'_> {
    fn breach(&mut self, line: usize, what: String) {
        self.breaches.push(Breach { file: self.file.into(), line, what });
    }

    fn import(&mut self, import: &Import) {
        self.path(&import.path, true);
    }

    /// Holds one path to the table. `import` says that it brings a name into scope, so that reaching the crate's
    /// root is reaching everything.
    fn path(&mut self, path: &[(String, usize)], import: bool) {
        let Some((first, line)) = path.first().map(|(name, line)| (name.as_str(), *line)) else { return };
        let written = path.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join("::");
        let layer = layer_of(self.file);
        let owners = OWNED_CRATES.iter().find(|(name, _)| *name == first).map(|(_, owners)| *owners);
        if let Some(owners) = owners.filter(|owners| !owners.contains(&layer)) {
            return self.breach(line, format!("{written}: only {} know the crate `{first}`", owners.join(" and ")));
        }
        if ROOTS.contains(&layer) || !is_root_word(first) || (path.len() == 1 && !import) {
            return;
        }
        let mut target = self.absolute(path);
        let Some(head) = target.first().cloned() else {
            let why = "takes in the crate's root, and with it every layer; name what is needed";
            return self.breach(line, format!("{written}: {why}"));
        };
        if let Some(place) = self.names.get(&head) {
            target.splice(..1, place.iter().cloned());
        } else if !LAYERS.iter().any(|row| row.0 == head) {
            let why = "is no layer of the table and no name that lib.rs re-exports";
            return self.breach(line, format!("{written}: `{head}` {why}"));
        }
        if !may_import(layer, &target) {
            let row = LAYERS.iter().find(|row| row.0 == layer).map_or(&[] as &[&str], |row| row.1);
            let may = if row.is_empty() { "nothing but `error`".into() } else { format!("error, {}", row.join(", ")) };
            let target = target.join("::");
            self.breach(line, format!("{written}: layer `{layer}` may not import `{target}` (it may import {may})"));
        }
    }

    /// The path from the crate's root: `super::x` inside `device::cpu` is `["device", "x"]`.
    fn absolute(&self, path: &[(String, usize)]) -> Vec<String> {
        let mut from = match path[0].0.as_str() {
            "crate" | "bitfit" => Vec::new(),
            _ => self.module.clone(),
        };
        for (name, _) in path {
            match name.as_str() {
                "crate" | "bitfit" | "self" => {}
                "super" => drop(from.pop()),
                name => from.push(name.into()),
            }
        }
        from
    }

    /// What looks like a path in tokens that the parser does not understand: a macro's input, an attribute's.
    fn tokens(&mut self, tokens: &TokenStream) {
        let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
        let colons = |at: usize| {
            let colon = |t: Option<&TokenTree>| matches!(t, Some(TokenTree::Punct(p)) if p.as_char() == ':');
            colon(tokens.get(at)) && colon(tokens.get(at + 1))
        };
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Group(group) => self.tokens(&group.stream()),
                TokenTree::Literal(text) if self.in_attribute => {
                    let text = syn::parse_str::<syn::LitStr>(&text.to_string()).map(|text| text.value());
                    if let Ok(path) = text.and_then(|text| syn::parse_str::<syn::Path>(&text)) {
                        let at = line(tokens[at].span());
                        let path: Vec<_> = path.segments.iter().map(|s| (s.ident.to_string(), at)).collect();
                        self.path(&path, false);
                    }
                }
                TokenTree::Ident(ident) if colons(at + 1) => {
                    let continues = at >= 3 && colons(at - 2) && matches!(tokens[at - 3], TokenTree::Ident(_));
                    let name = ident.to_string();
                    if !continues && (is_root_word(&name) || OWNED_CRATES.iter().any(|(owned, _)| *owned == name)) {
                        let (imports, end) = path_in(&tokens, at);
                        imports.iter().for_each(|import| self.import(import));
                        at = end;
                        continue;
                    }
                }
                _ => {}
            }
            at += 1;
        }
    }
}

/// The path that begins at token `at`, spelled out where it ends in a group or glob, and where it ends.
fn path_in(tokens: &[TokenTree], at: usize) -> (Vec<Import>, usize) {
    let mut end = at + 1;
    while end + 2 < tokens.len() && matches!(&tokens[end], TokenTree::Punct(p) if p.as_char() == ':') {
        match &tokens[end + 2] {
            TokenTree::Ident(_) => end += 3,
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                let whole = tokens[at..end + 3].iter().cloned().collect();
                if let Ok(tree) = syn::parse2::<syn::UseTree>(whole) {
                    return (flatten(&tree), end + 3);
                }
                break;
            }
            TokenTree::Punct(p) if p.as_char() == '*' => {
                let whole = tokens[at..end + 3].iter().cloned().collect();
                return (syn::parse2(whole).map(|tree| flatten(&tree)).unwrap_or_default(), end + 3);
            }
            _ => break,
        }
    }
    let names = tokens[at..end].iter().filter_map(|token| match token {
        TokenTree::Ident(ident) => Some((ident.to_string(), line(ident.span()))),
        _ => None,
    });
    (vec![Import { path: names.collect(), name: String::new() }], end)
}

fn may_import(layer: &str, target: &[String]) -> bool {
    let row = LAYERS.iter().find(|row| row.0 == layer).map_or(&[] as &[&str], |row| row.1);
    let own = [layer, "error"];
    own.iter().chain(row).any(|edge| {
        let edge: Vec<&str> = edge.split("::").collect();
        target.len() >= edge.len() && edge.iter().zip(target).all(|(a, b)| a == b)
    })
}

impl<'ast> Visit<'ast> for Imports<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        item.attrs.iter().for_each(|attribute| self.visit_attribute(attribute));
        flatten(&item.tree).iter().for_each(|import| self.import(import));
    }

    fn visit_item_extern_crate(&mut self, item: &'ast syn::ItemExternCrate) {
        self.path(&[(item.ident.to_string(), line(item.ident.span()))], true);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if let Some(attribute) = item.attrs.iter().find(|a| a.path().is_ident("path")) {
            let at = attribute.path().segments.first().map_or(0, |s| line(s.ident.span()));
            self.breach(at, format!("#[path] on `mod {}`: a module's file stands where its path says", item.ident));
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|s| (s.ident.to_string(), line(s.ident.span()))).collect();
        self.path(&names, false);
        visit::visit_path(self, path);
    }

    /// `pub(in crate::device)` says who may see an item; it imports nothing.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_meta_list(&mut self, list: &'ast syn::MetaList) {
        self.in_attribute = true;
        visit::visit_meta_list(self, list);
        self.in_attribute = false;
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        self.tokens(tokens);
    }
}
