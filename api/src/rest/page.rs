//! Lists, page by page.

use crate::resource::List;
use godwit_channel::problem::Refusal;
use godwit_controller::view::View;
use godwit_wire::problem::{FieldProblem, Problem};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Bound;
use std::str::FromStr;
use std::sync::Arc;
use utoipa::IntoParams;

/// Items in a page unless asked otherwise.
const DEFAULT_LIMIT: usize = 500;
/// Most items in a page.
const MAX_LIMIT: usize = 5_000;

/// Parameters of every list.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Most items to answer with, 1 to 5000; 500 when absent.
    #[param(minimum = 1, maximum = 5000, default = 500)]
    pub(super) limit: Option<usize>,
    /// `next` of the page before.
    pub(super) cursor: Option<String>,
}

/// Judges a limit.
pub(super) fn limit(asked: Option<usize>) -> Result<usize, Refusal> {
    match asked.unwrap_or(DEFAULT_LIMIT) {
        limit @ 1..=MAX_LIMIT => Ok(limit),
        limit => Err(Refusal(Problem::invalid(vec![FieldProblem::new(
            "limit",
            format!("{limit} is outside 1..={MAX_LIMIT}"),
            format!("ask for 1 to {MAX_LIMIT} items and follow `next`"),
        )]))),
    }
}

/// The page of `records` that `query` asks for.
pub(super) fn page<Id, R, T>(
    query: &PageQuery,
    view: &View,
    records: &BTreeMap<Id, Arc<R>>,
    convert: impl Fn(&R) -> T,
) -> Result<List<T>, Refusal>
where
    Id: Copy + Ord + Display + FromStr,
{
    let limit = limit(query.limit)?;
    let after: Bound<Id> = match query.cursor.as_deref().filter(|cursor| !cursor.is_empty()) {
        None => Bound::Unbounded,
        Some(cursor) => Bound::Excluded(cursor.parse().map_err(|_: Id::Err| bad_cursor(cursor))?),
    };
    let mut rest = records.range((after, Bound::Unbounded));
    let mut items = Vec::with_capacity(limit.min(records.len()));
    let mut last = None;
    for (id, record) in rest.by_ref().take(limit) {
        items.push(convert(record));
        last = Some(*id);
    }
    let next = rest.next().and(last).map(|id| id.to_string());
    Ok(List {
        items,
        next,
        revision: view.event_revision,
    })
}

fn bad_cursor(cursor: &str) -> Refusal {
    Refusal(Problem::invalid(vec![FieldProblem::new(
        "cursor",
        format!("{cursor:?} is not a cursor"),
        "use `next` of the page before, or leave it out for the first page",
    )]))
}
