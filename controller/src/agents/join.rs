//! A host joins: a one-time token buys a certificate.

use crate::agents::Agents;
use crate::ledger::Draft;
use crate::model::limits::MAX_HOSTS;
use crate::model::{Actor, Host, Subject, TokenUse, name};
use crate::view::View;
use godwit_channel::pki::secret_digest;
use godwit_wire::host_api::{JoinReply, JoinRequest};
use godwit_wire::id::HostId;
use godwit_wire::problem::Problem;
use std::collections::BTreeMap;

pub(super) async fn answer(agents: &Agents, request: JoinRequest) -> Result<JoinReply, Problem> {
    let Some(authority) = &agents.authority else {
        return Err(Problem::internal("this server has no CA"));
    };
    if let Some(problem) = name::problem("facts.name", &request.facts.name) {
        return Err(Problem::invalid(vec![problem]));
    }
    let fresh = HostId::fresh();
    // Signed first: a request that cannot be signed must not use the token up.
    let sign = |host| {
        authority
            .sign_host(&request.csr_pem, host)
            .map_err(|error| {
                Problem::new(
                    422,
                    "bad-request-for-certificate",
                    "The certificate request is unusable",
                    error.to_string(),
                )
            })
    };
    let signed_fresh = sign(fresh)?;
    let host = agents
        .core
        .ledger
        .change(|view, draft| admit(view, draft, &request, fresh))
        .await?;
    let certificate_pem = if host == fresh {
        signed_fresh
    } else {
        sign(host)?
    };
    Ok(JoinReply {
        host,
        certificate_pem,
        ca_pem: authority.certificate_pem().to_owned(),
    })
}

fn admit(
    view: &View,
    draft: &mut Draft<'_>,
    request: &JoinRequest,
    fresh: HostId,
) -> Result<HostId, Problem> {
    let denied = |detail: &str| {
        Err(
            Problem::new(403, "bad-token", "The join token is not valid", detail)
                .with_remedy("make a new token with `godwit host token` and use it at once"),
        )
    };
    let digest = secret_digest(&request.token);
    let Some(token) = draft.token(&digest) else {
        return denied("the token is unknown");
    };
    if token.expires_at < draft.now() {
        return denied("the token has expired");
    }
    let csr_sha256 = secret_digest(&request.csr_pem);
    if let Some(used) = &token.used {
        // The same key again: the answer was lost.
        return match used.csr_sha256 == csr_sha256 && view.hosts.contains_key(&used.host) {
            true => Ok(used.host),
            false => denied("the token was used already"),
        };
    }
    let name = &request.facts.name;
    if view.find_host(name).is_some() {
        return Err(
            Problem::conflict("name-taken", format!("the pool has a host {name} already"))
                .with_remedy("choose another name, or remove that host first"),
        );
    }
    if view.hosts.len() >= MAX_HOSTS {
        return Err(Problem::conflict(
            "pool-full",
            format!("a pool has at most {MAX_HOSTS} hosts"),
        ));
    }
    let mut token = token.clone();
    let actor: Actor = token.actor.clone();
    token.used = Some(TokenUse {
        host: fresh,
        csr_sha256,
    });
    draft.put_token(digest, token);
    draft.put_host(Host {
        id: fresh,
        facts: request.facts.clone(),
        cordon: None,
        maintenance: None,
        joined_at: draft.now(),
        first_heard_at: None,
        migration_bandwidth: None,
        link_bandwidth: BTreeMap::new(),
    });
    draft.info(
        "host.joined",
        Subject::host(fresh, name),
        &actor,
        format!("{name} joined with a token of {actor}"),
    );
    Ok(fresh)
}
