//! Who sends a request: API keys, and what they may. Without configured keys everyone may everything (weir then listens on
//! loopback only); with keys, `/v1/*` needs one of them, and `/v1/audit/*`, `/v1/fleet` and `/metrics` one with `admin`. `/healthz`,
//! `/readyz` and `/openapi.json` are always open.

use std::{fmt, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};

use super::{App, error::ApiError};
use crate::{domain::KeyView, gateway::Caller};

/// An API key as configured.
#[derive(Clone)]
pub struct ApiKey {
    /// Goes into records; the secret never does.
    pub name: String,
    pub secret: String,
    pub tenant: String,
    pub tier: String,
    /// Whether it may read the record and the metrics.
    pub admin: bool,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("name", &self.name).field("admin", &self.admin).finish_non_exhaustive()
    }
}

/// The configured keys, by the hashes of their secrets.
pub(super) struct Keys(Vec<Key>);

struct Key {
    hash: blake3::Hash,
    view: KeyView,
    admin: bool,
}

impl Keys {
    pub(super) fn new(keys: Vec<ApiKey>) -> Self {
        let key = |key: ApiKey| Key {
            hash: blake3::hash(key.secret.as_bytes()),
            view: KeyView { id: key.name, tenant: key.tenant, tier: key.tier, ..KeyView::default() },
            admin: key.admin,
        };
        Self(keys.into_iter().map(key).collect())
    }

    /// The caller of a request, and whether it is an administrator's.
    fn identify(&self, headers: &HeaderMap) -> Result<(Caller, bool), ApiError> {
        let authorization = headers.get(header::AUTHORIZATION);
        if self.0.is_empty() {
            let authorization = authorization.and_then(|value| value.to_str().ok()).map(str::to_owned);
            return Ok((Caller { key: KeyView::default(), authorization }, true));
        }
        let Some(authorization) = authorization else {
            return Err(ApiError::unauthenticated(
                "You did not provide an API key; send one as `authorization: Bearer KEY` (`api_key` of the openai packages).",
            ));
        };
        let Some(token) = bearer(authorization.as_bytes()) else {
            return Err(ApiError::unauthenticated("The `authorization` header must be of the form `Bearer KEY`."));
        };
        // Hashes of equal length, compared in constant time, all of them: how long it takes tells nothing.
        let hash = blake3::hash(token);
        let mut found = None;
        for key in &self.0 {
            if key.hash == hash {
                found = Some(key);
            }
        }
        let key = found.ok_or_else(|| ApiError::unauthenticated("The API key is not one of those configured here."))?;
        // The header held weir's own key: no upstream's business, even where client keys are forwarded.
        Ok((Caller { key: key.view.clone(), authorization: None }, key.admin))
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// A caller with a valid key; a handler without it is open to all.
pub(super) struct Authorized(pub Caller);

/// A caller whose key is an administrator's.
pub(super) struct Admin(pub Caller);

impl FromRequestParts<Arc<App>> for Authorized {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        app.keys.identify(&parts.headers).map(|(caller, _)| Self(caller))
    }
}

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        match app.keys.identify(&parts.headers)? {
            (caller, true) => Ok(Self(caller)),
            (caller, false) => Err(ApiError::forbidden(
                "admin_key_required",
                format!("The API key `{}` may not do this; it needs a key with `admin: true`.", caller.key.id),
            )),
        }
    }
}
