//! The database file: its tables, what is read from and written to them, what is thrown out.
//!
//! SQLite in WAL mode: after a crash a write is whole or absent, and damage in the file is an
//! error of the call that meets it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::config::DbConfig;
use rusqlite::types::Type;
use rusqlite::{Connection, Error, ErrorCode, OptionalExtension, Result, Row, params};
use serde_json::{Value, json};

use super::{Conversation, History, Page, PageQuery};
use crate::admission::Owner;
use crate::responses::types::{Link, Record};

/// Version of the tables, kept in the file.
const VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE responses (
        id TEXT PRIMARY KEY NOT NULL, owner BLOB NOT NULL, status TEXT NOT NULL, used_at INTEGER NOT NULL,
        previous TEXT, body BLOB NOT NULL, input BLOB NOT NULL, output BLOB NOT NULL
    ) STRICT;
    CREATE INDEX responses_used_at ON responses (used_at);
    CREATE INDEX responses_status ON responses (status) WHERE status IN ('queued', 'in_progress');
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY NOT NULL, owner BLOB NOT NULL, created_at INTEGER NOT NULL,
        used_at INTEGER NOT NULL, metadata BLOB NOT NULL
    ) STRICT;
    CREATE INDEX conversations_used_at ON conversations (used_at);
    CREATE TABLE items (
        conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        position INTEGER NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (conversation, position)
    ) STRICT;
    CREATE UNIQUE INDEX items_id ON items (conversation, id);";
/// Oldest first, with their sizes; what still runs is not for eviction.
const OLDEST: &str = "
    SELECT 0, id, used_at, length(body) + length(input) + length(output) FROM responses
        WHERE status NOT IN ('queued', 'in_progress')
    UNION ALL
    SELECT 1, id, used_at, (SELECT coalesce(sum(length(body)), 0) FROM items WHERE conversation = c.id)
        FROM conversations AS c
    ORDER BY used_at LIMIT 256";
/// What was marked as used within this many seconds need not be marked again.
const TOUCH: u64 = 600;
/// Of the cap, what eviction leaves: it should not have to run for every write.
const KEEP: f64 = 0.9;

/// Why a file cannot be used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// Another process has it.
    InUse,
    /// The file system says no.
    Inaccessible(String),
}

/// What may be written over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// Nothing need be there.
    New,
    /// What is no longer there stays away.
    Known,
}

/// An open database.
pub(super) struct Db {
    connection: Connection,
    path: Option<PathBuf>,
}

impl Db {
    /// Opens or makes the file. A damaged one is moved aside.
    pub fn open(path: &Path) -> std::result::Result<Self, Unusable> {
        let mut moved = false;
        loop {
            let error = match prepare(connect(path)) {
                Ok(connection) => return Ok(Self { connection, path: Some(path.to_owned()) }),
                Err(error) => error,
            };
            match error.sqlite_error_code() {
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => return Err(Unusable::InUse),
                Some(
                    ErrorCode::CannotOpen
                    | ErrorCode::DiskFull
                    | ErrorCode::FileLockingProtocolFailed
                    | ErrorCode::OutOfMemory
                    | ErrorCode::PermissionDenied
                    | ErrorCode::ReadOnly
                    | ErrorCode::SystemIoFailure,
                ) => return Err(Unusable::Inaccessible(error.to_string())),
                _ if moved => return Err(Unusable::Inaccessible(error.to_string())),
                _ => move_aside(path, &error).map_err(|error| Unusable::Inaccessible(error.to_string()))?,
            }
            moved = true;
        }
    }

    /// A database that ends with the process.
    pub fn in_memory() -> Result<Self> {
        Ok(Self { connection: prepare(Connection::open_in_memory())?, path: None })
    }

    /// After damage was met: the file is moved aside and an empty one takes its place.
    pub fn replace(&mut self, error: &Error) -> Result<()> {
        let Some(path) = self.path.clone() else { return Ok(()) };
        self.connection = Self::in_memory()?.connection;
        move_aside(&path, error).map_err(|_| Error::InvalidPath(path.clone()))?;
        self.connection = prepare(connect(&path))?;
        Ok(())
    }

    /// Runs `work` in a transaction.
    pub fn transaction<T>(&self, work: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let transaction = self.connection.unchecked_transaction()?;
        let result = work(self)?;
        transaction.commit()?;
        Ok(result)
    }

    /// Writes a response. When it is complete, a conversation that it belongs to takes up what it
    /// said and was told. Returns whether it was there before.
    pub fn put(&self, owner: &Owner, record: &Record, write: Write, now: u64) -> Result<bool> {
        let text = |key: &str| record.response[key].as_str();
        let (id, status) = (text("id").unwrap_or_default(), text("status").unwrap_or_default());
        let mut body = record.response.clone();
        let output = body.get_mut("output").map_or(Value::Null, Value::take);
        let known = self.owner(id)?;
        // Ids are random; one that is another's already was not made here.
        if known.is_some_and(|known| known != *owner.digest()) {
            return Ok(false);
        }
        if known.is_some() || write == Write::New {
            let sql = "INSERT OR REPLACE INTO responses VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
            let (body, input, said) = (bytes(&body), bytes(&record.input), bytes(&output));
            let row =
                params![id, owner.digest(), status, now, text("previous_response_id"), body, input, said];
            self.connection.prepare_cached(sql)?.execute(row)?;
            self.touch(text("previous_response_id"), now)?;
        }
        let conversation = record.response["conversation"]["id"].as_str();
        if let (Some(conversation), "completed" | "incomplete") = (conversation, status)
            && self.conversation(owner, conversation)?.is_some()
        {
            self.append(
                conversation,
                record.input.iter().chain(output.as_array().into_iter().flatten()),
                now,
            )?;
        }
        Ok(known.is_some())
    }

    fn owner(&self, id: &str) -> Result<Option<[u8; 32]>> {
        let sql = "SELECT owner FROM responses WHERE id = ?1";
        self.connection.prepare_cached(sql)?.query_row([id], |row| row.get(0)).optional()
    }

    /// A response and its input items.
    pub fn get(&self, owner: &Owner, id: &str) -> Result<Option<Record>> {
        let sql = "SELECT body, input, output FROM responses WHERE id = ?1 AND owner = ?2";
        let read = |row: &Row<'_>| Ok((json_at(row, 0)?, json_at(row, 1)?, json_at(row, 2)?));
        let found = self.connection.prepare_cached(sql)?.query_row(params![id, owner.digest()], read);
        let Some((mut response, input, output)): Option<(Value, _, Value)> = found.optional()? else {
            return Ok(None);
        };
        if let Some(fields) = response.as_object_mut() {
            fields.insert("output".into(), output);
        }
        Ok(Some(Record { response, input: array(input) }))
    }

    /// Forgets a response; whether there was one.
    pub fn delete(&self, owner: &Owner, id: &str) -> Result<bool> {
        let sql = "DELETE FROM responses WHERE id = ?1 AND owner = ?2";
        Ok(self.connection.prepare_cached(sql)?.execute(params![id, owner.digest()])? > 0)
    }

    /// What was said and told up to the end of a response, from the first of its chain on.
    pub fn history(&self, owner: &Owner, id: &str, now: u64) -> Result<History> {
        let mut links = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(id.to_owned());
        // The chain's is named after its first response.
        let mut session: Option<Arc<str>> = None;
        let sql = "SELECT previous, status, input, output FROM responses WHERE id = ?1 AND owner = ?2";
        let mut select = self.connection.prepare_cached(sql)?;
        while let Some(id) = next {
            let link = select.query_row(params![id, owner.digest()], |row| {
                let status: String = row.get(1)?;
                Ok((row.get(0)?, status, array(json_at(row, 2)?), array(json_at(row, 3)?)))
            });
            let Some((previous, status, input, output)) = link.optional()? else {
                return Ok(History::Missing);
            };
            let ended_well = matches!(status.as_str(), "completed" | "incomplete" | "cancelled");
            if !ended_well || !seen.insert(id.clone()) {
                return Ok(History::Missing);
            }
            links.push((input, output));
            session = Some(id.into());
            next = previous;
        }
        self.touch(Some(id), now)?;
        let mut last = None;
        for (input, output) in links.into_iter().rev() {
            last = Some(Arc::new(Link::new(last, input, output, session.clone())));
        }
        Ok(last.map_or(History::Missing, History::Found))
    }

    /// Everything that a response was made from. What came before it may be gone.
    pub fn input_items(&self, owner: &Owner, id: &str, now: u64) -> Result<Option<Vec<Value>>> {
        let Some(record) = self.get(owner, id)? else { return Ok(None) };
        let mut items = Vec::new();
        if let Some(previous) = record.response["previous_response_id"].as_str()
            && let History::Found(link) = self.history(owner, previous, now)?
        {
            let mut before = Vec::new();
            link.items(&mut before);
            items.extend(before.into_iter().cloned());
        }
        items.extend(record.input);
        Ok(Some(items))
    }

    /// Marks a response and those before it as used. Whoever was marked lately marked those before
    /// it too.
    fn touch(&self, id: Option<&str>, now: u64) -> Result<()> {
        let mut next = id.map(str::to_owned);
        let sql = "UPDATE responses SET used_at = ?2 WHERE id = ?1 AND used_at < ?3 RETURNING previous";
        let mut touch = self.connection.prepare_cached(sql)?;
        while let Some(id) = next {
            let before = now.saturating_sub(TOUCH);
            next = touch.query_row(params![id, now, before], |row| row.get(0)).optional()?.flatten();
        }
        Ok(())
    }

    /// Writes a conversation's head.
    pub fn put_conversation(&self, owner: &Owner, conversation: &Conversation, now: u64) -> Result<()> {
        let sql = "INSERT INTO conversations VALUES (?1, ?2, ?3, ?4, ?5)
            ON CONFLICT (id) DO UPDATE SET used_at = excluded.used_at, metadata = excluded.metadata";
        let Conversation { id, created_at, metadata } = conversation;
        let metadata = bytes(metadata);
        self.connection.prepare_cached(sql)?.execute(params![
            id,
            owner.digest(),
            created_at,
            now,
            metadata
        ])?;
        Ok(())
    }

    /// A conversation's head.
    pub fn conversation(&self, owner: &Owner, id: &str) -> Result<Option<Conversation>> {
        let sql = "SELECT created_at, metadata FROM conversations WHERE id = ?1 AND owner = ?2";
        self.connection
            .prepare_cached(sql)?
            .query_row(params![id, owner.digest()], |row| {
                Ok(Conversation { id: id.to_owned(), created_at: row.get(0)?, metadata: json_at(row, 1)? })
            })
            .optional()
    }

    /// Forgets a conversation and its items; whether there was one.
    pub fn delete_conversation(&self, owner: &Owner, id: &str) -> Result<bool> {
        let sql = "DELETE FROM conversations WHERE id = ?1 AND owner = ?2";
        Ok(self.connection.prepare_cached(sql)?.execute(params![id, owner.digest()])? > 0)
    }

    /// Adds items to a conversation that exists; those it has already (by id) stay as they are.
    pub fn append<'a>(
        &self,
        conversation: &str,
        items: impl IntoIterator<Item = &'a Value>,
        now: u64,
    ) -> Result<()> {
        let sql = "INSERT OR IGNORE INTO items VALUES
            (?1, (SELECT coalesce(max(position), 0) + 1 FROM items WHERE conversation = ?1), ?2, ?3)";
        let mut insert = self.connection.prepare_cached(sql)?;
        for item in items {
            insert.execute(params![conversation, item["id"].as_str().unwrap_or_default(), bytes(item)])?;
        }
        let sql = "UPDATE conversations SET used_at = ?2 WHERE id = ?1";
        self.connection.prepare_cached(sql)?.execute(params![conversation, now])?;
        Ok(())
    }

    /// All items of a conversation that exists, in their order.
    pub fn items(&self, conversation: &str) -> Result<Vec<Value>> {
        let sql = "SELECT body FROM items WHERE conversation = ?1 ORDER BY position";
        self.connection.prepare_cached(sql)?.query_map([conversation], |row| json_at(row, 0))?.collect()
    }

    /// Some items of a conversation that exists. `None`: it has no item `after`.
    pub fn page(&self, conversation: &str, query: &PageQuery) -> Result<Option<Page>> {
        let after = match &query.after {
            None => None,
            Some(id) => match self.position(conversation, id)? {
                None => return Ok(None),
                position => position,
            },
        };
        let sql = match query.ascending {
            true => "position > coalesce(?2, 0) ORDER BY position",
            false => "position < coalesce(?2, 9223372036854775807) ORDER BY position DESC",
        };
        let sql = format!("SELECT body FROM items WHERE conversation = ?1 AND {sql} LIMIT ?3");
        let mut select = self.connection.prepare_cached(&sql)?;
        let rows = select.query_map(params![conversation, after, query.limit + 1], |row| json_at(row, 0))?;
        let mut items = rows.collect::<Result<Vec<Value>>>()?;
        let has_more = items.len() > query.limit;
        items.truncate(query.limit);
        Ok(Some(Page { items, has_more }))
    }

    /// One item of a conversation that exists.
    pub fn item(&self, conversation: &str, id: &str) -> Result<Option<Value>> {
        let sql = "SELECT body FROM items WHERE conversation = ?1 AND id = ?2";
        self.connection.prepare_cached(sql)?.query_row([conversation, id], |row| json_at(row, 0)).optional()
    }

    /// Forgets one item of a conversation that exists; whether there was one.
    pub fn delete_item(&self, conversation: &str, id: &str) -> Result<bool> {
        let sql = "DELETE FROM items WHERE conversation = ?1 AND id = ?2";
        Ok(self.connection.prepare_cached(sql)?.execute([conversation, id])? > 0)
    }

    fn position(&self, conversation: &str, id: &str) -> Result<Option<i64>> {
        let sql = "SELECT position FROM items WHERE conversation = ?1 AND id = ?2";
        self.connection.prepare_cached(sql)?.query_row([conversation, id], |row| row.get(0)).optional()
    }

    /// Marks responses that were running when the process ended as failed. Returns how many.
    pub fn fail_unfinished(&self) -> Result<usize> {
        let sql = "SELECT id, body FROM responses WHERE status IN ('queued', 'in_progress')";
        let rows = self
            .connection
            .prepare(sql)?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<Vec<(String, Vec<u8>)>>>()?;
        for (id, body) in &rows {
            // What cannot be read is not worth keeping.
            let Ok(Value::Object(mut body)) = serde_json::from_slice(body) else {
                self.connection.execute("DELETE FROM responses WHERE id = ?1", [id])?;
                continue;
            };
            body.insert("status".into(), "failed".into());
            body.insert(
                "error".into(),
                json!({"code": "server_error", "message": "The server restarted while it ran."}),
            );
            let sql = "UPDATE responses SET status = 'failed', body = ?2 WHERE id = ?1";
            self.connection.execute(sql, params![id, bytes(&body)])?;
        }
        Ok(rows.len())
    }

    /// Throws out what was last used before `before` (Unix time). Returns how many entries.
    pub fn expire(&self, before: u64) -> Result<usize> {
        let running = "status NOT IN ('queued', 'in_progress')";
        let sql = format!("DELETE FROM responses WHERE used_at < ?1 AND {running}");
        let responses = self.connection.prepare_cached(&sql)?.execute([before])?;
        let sql = "DELETE FROM conversations WHERE used_at < ?1";
        Ok(responses + self.connection.prepare_cached(sql)?.execute([before])?)
    }

    /// Bytes in use.
    pub fn size(&self) -> Result<u64> {
        let pragma = |name| self.connection.pragma_query_value(None, name, |row| row.get::<_, u64>(0));
        Ok(pragma("page_count")?.saturating_sub(pragma("freelist_count")?) * pragma("page_size")?)
    }

    /// If more than `max` bytes are in use, throws out what was used longest ago. Returns how many
    /// entries.
    pub fn evict(&self, max: u64) -> Result<usize> {
        let mut evicted = 0;
        if self.size()? <= max {
            return Ok(0);
        }
        let target = (max as f64 * KEEP) as u64;
        loop {
            let mut excess = self.size()?.saturating_sub(target);
            let mut oldest = self.connection.prepare_cached(OLDEST)?;
            let rows = oldest.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(3)?)))?;
            let rows = rows.collect::<Result<Vec<(bool, String, u64)>>>()?;
            if excess == 0 || rows.is_empty() {
                break;
            }
            let before = evicted;
            for (is_conversation, id, bytes) in rows {
                let table = if is_conversation { "conversations" } else { "responses" };
                evicted += self.connection.execute(&format!("DELETE FROM {table} WHERE id = ?1"), [id])?;
                excess = excess.saturating_sub(bytes);
                if excess == 0 {
                    break;
                }
            }
            // In a damaged file an index may name what is not there.
            if evicted == before {
                break;
            }
        }
        Ok(evicted)
    }

    /// Gives free pages back to the file system.
    pub fn shrink(&self) -> Result<()> {
        // The pragma frees a page with every row that it is asked for.
        self.connection.prepare_cached("PRAGMA incremental_vacuum")?.query_map([], |_| Ok(()))?.count();
        self.connection.prepare_cached("PRAGMA wal_checkpoint(TRUNCATE)")?.query_map([], |_| Ok(()))?.count();
        Ok(())
    }

    /// Lets a test bring about what a machine may do.
    #[cfg(test)]
    pub fn pragma(&self, pragma: &str) -> Result<()> {
        self.connection.prepare(&format!("PRAGMA {pragma}"))?.query_map([], |_| Ok(()))?.count();
        Ok(())
    }
}

/// Whether an error means that the file is damaged.
pub(super) fn is_damage(error: &Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Opens or makes the file, which its owner alone may read: it holds whole conversations. What SQLite puts beside
/// it gets the mode that it has.
fn connect(path: &Path) -> Result<Connection> {
    #[cfg(unix)]
    keep_private(path);
    Connection::open(path)
}

/// Never opens a file that is there: closing it would let go of the locks that this process has on it.
#[cfg(unix)]
fn keep_private(path: &Path) {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    // One that cannot be made SQLite cannot make either, and says why.
    let _ = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    for end in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        let file = Path::new(&name);
        if let Err(error) = std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "others may be able to read {}, which holds stored responses", file.display());
        }
    }
}

/// Sets a fresh connection up and sees that the file holds our tables, whole.
fn prepare(connection: Result<Connection>) -> Result<Connection> {
    let connection = connection?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_prepared_statement_cache_capacity(64);
    // One process at a time: another's running responses must not be taken for a crash's.
    connection.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA auto_vacuum = INCREMENTAL;
         PRAGMA journal_mode = WAL;
         PRAGMA synchronous = NORMAL;
         PRAGMA foreign_keys = ON;
         PRAGMA cell_size_check = ON;
         PRAGMA journal_size_limit = 16777216;",
    )?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables == 0 {
        connection
            .execute_batch(&format!("BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;"))?;
    }
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let whole: String = connection.pragma_query_value(None, "quick_check", |row| row.get(0))?;
    if version != VERSION || whole != "ok" {
        return Err(Error::InvalidParameterName(format!("tables of version {version}, checked: {whole}")));
    }
    // Another program's tables under these names would fail here.
    for sql in [
        "SELECT id, owner, status, used_at, previous, body, input, output FROM responses",
        "SELECT id, owner, created_at, used_at, metadata FROM conversations",
        "SELECT conversation, position, id, body FROM items",
        OLDEST,
    ] {
        connection.prepare(sql)?;
    }
    Ok(connection)
}

/// Renames the file and what belongs to it, so that it can be looked at.
fn move_aside(path: &Path, error: &Error) -> std::io::Result<()> {
    let aside = format!("damaged-{}", crate::unix_now());
    for suffix in ["-wal", "-shm", "-journal", ""] {
        let mut from = path.as_os_str().to_owned();
        from.push(suffix);
        let mut to = path.as_os_str().to_owned();
        to.push(format!(".{aside}{suffix}"));
        match std::fs::rename(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    tracing::warn!(
        file = %path.display(), %error,
        "the database of stored responses is damaged; it was moved aside (.{aside}) and a new one begun"
    );
    Ok(())
}

fn bytes(value: &impl serde::Serialize) -> Vec<u8> {
    // JSON values always serialise.
    serde_json::to_vec(value).unwrap_or_default()
}

fn json_at(row: &Row<'_>, column: usize) -> Result<Value> {
    let bytes = row.get_ref(column)?.as_blob()?;
    serde_json::from_slice(bytes)
        .map_err(|error| Error::FromSqlConversionFailure(column, Type::Blob, Box::new(error)))
}

fn array(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}
