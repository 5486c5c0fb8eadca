//! Many migrations in a row; `tests/run soak` makes thousands of them.

use godwit_tests::{require, skip, soak};

#[tokio::test]
async fn three_hundred_migrations_in_a_row_lose_nothing() {
    require!(skip::kvm());
    const LANDINGS: u64 = 300;
    let verdict = soak::run(LANDINGS, 4).await.expect("nothing is found");
    assert_eq!(verdict.landed, LANDINGS);
    println!("{verdict}");
}
