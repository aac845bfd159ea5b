//! Finds what prints below `cli`.

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::imports::flatten;
use super::{Breach, EDGE, PRINTING_HANDLES, PRINTING_MACROS, layer_of, line, parse};

/// Walks a file below `cli` and reports what prints. Unit tests may: they say there why they are skipped.
struct Printing<'a> {
    file: &'a str,
    breaches: Vec<Breach>,
}

pub fn check_printing(file: &str, source: &str) -> Vec<Breach> {
    let mut walk = Printing { file, breaches: Vec::new() };
    if !EDGE.contains(&layer_of(file)) {
        walk.visit_file(&parse(file, source));
    }
    walk.breaches
}

impl Printing<'_> {
    fn breach(&mut self, line: usize, name: &str) {
        let what = format!("{name}: below cli nothing prints; report through a callback, a result or an error");
        self.breaches.push(Breach { file: self.file.into(), line, what });
    }

    fn path(&mut self, path: &[(String, usize)]) {
        if let [.., (module, _), (name, line)] = path
            && module == "io"
            && PRINTING_HANDLES.contains(&name.as_str())
        {
            self.breach(*line, &format!("io::{name}"));
        }
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        syn::Meta::NameValue(_) => false,
    })
}

impl<'ast> Visit<'ast> for Printing<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        flatten(&item.tree).iter().for_each(|import| self.path(&import.path));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|s| (s.ident.to_string(), line(s.ident.span()))).collect();
        self.path(&names);
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        if let Some(last) = mac.path.segments.last()
            && PRINTING_MACROS.iter().any(|name| last.ident == name)
        {
            self.breach(line(last.ident.span()), &format!("{}!", last.ident));
        }
        visit::visit_macro(self, mac);
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
        for (at, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Group(group) => self.visit_token_stream(&group.stream()),
                TokenTree::Ident(ident) if PRINTING_MACROS.iter().any(|name| ident == name) => {
                    if matches!(tokens.get(at + 1), Some(TokenTree::Punct(p)) if p.as_char() == '!') {
                        self.breach(line(ident.span()), &format!("{ident}!"));
                    }
                }
                _ => {}
            }
        }
    }
}
