//! Hello, Welcome and Refuse as bytes: what both ends of a data link say first.

use walferry_engine::lsn::{Epoch, Lsn};

use super::types::{ADDRESS_BYTES_MAX, Hello, REFUSE_TEXT_BYTES_MAX, Refuse, RefuseCode, Welcome};
use crate::error::MessageError;
use crate::member::ClusterId;
use crate::register::MemberId;

use super::body::{Body, cut, put_handshake, put_history, put_u64s};

pub(super) fn encode_hello(out: &mut Vec<u8>, hello: &Hello) {
    let address = cut(&hello.client_address, ADDRESS_BYTES_MAX);
    put_handshake(out, hello.protocol, &hello.name, address, hello.cluster_id);
    put_u64s(out, &[hello.flushed.0, hello.segment_bytes]);
    out.extend_from_slice(&hello.crc.to_le_bytes());
    put_u64s(out, &[hello.member.0, hello.gives_up.0]);
    put_history(out, &hello.history);
    out.extend_from_slice(hello.name.as_str().as_bytes());
    out.extend_from_slice(address.as_bytes());
}

pub(super) fn decode_hello(mut body: Body<'_>) -> Result<Hello, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        let name = "unknown".parse().expect("a name");
        let (flushed, client_address, history) = (Lsn::ZERO, String::new(), Vec::new());
        return Ok(Hello {
            protocol,
            cluster_id: None,
            name,
            client_address,
            flushed,
            segment_bytes: 0,
            crc: 0,
            member: MemberId(0),
            gives_up: Epoch(0),
            history,
        });
    }
    let [name_bytes, address_bytes] = body.number()?;
    let id = u128::from_le_bytes(body.number()?);
    let cluster_id = (id != 0).then_some(ClusterId(id));
    let (flushed, segment_bytes, crc) = (body.lsn()?, body.u64()?, body.u32()?);
    let (member, gives_up) = (MemberId(body.u64()?), Epoch(body.u64()?));
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    let client_address = body.address(address_bytes)?;
    body.end()?;
    Ok(Hello { protocol, cluster_id, name, client_address, flushed, segment_bytes, crc, member, gives_up, history })
}

pub(super) fn encode_welcome(out: &mut Vec<u8>, welcome: &Welcome) {
    let address = cut(&welcome.client_address, ADDRESS_BYTES_MAX);
    put_handshake(out, welcome.protocol, &welcome.name, address, Some(welcome.cluster_id));
    put_u64s(out, &[welcome.start.0, welcome.segment_bytes]);
    out.extend_from_slice(&welcome.heartbeat_ms.to_le_bytes());
    put_history(out, &welcome.history);
    out.extend_from_slice(welcome.name.as_str().as_bytes());
    out.extend_from_slice(address.as_bytes());
    out.extend_from_slice(welcome.policy.to_string().as_bytes());
}

pub(super) fn decode_welcome(mut body: Body<'_>) -> Result<Welcome, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        return Err(body.field("protocol version"));
    }
    let [name_bytes, address_bytes] = body.number()?;
    let cluster_id = ClusterId(u128::from_le_bytes(body.number()?));
    let (start, segment_bytes, heartbeat_ms) = (body.lsn()?, body.u64()?, body.u32()?);
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    let client_address = body.address(address_bytes)?;
    let policy = body.policy()?;
    Ok(Welcome { protocol, cluster_id, name, start, segment_bytes, client_address, heartbeat_ms, history, policy })
}

pub(super) fn encode_refuse(out: &mut Vec<u8>, refuse: &Refuse) {
    out.extend_from_slice(&(refuse.code as u16).to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(cut(&refuse.text, REFUSE_TEXT_BYTES_MAX).as_bytes());
}

pub(super) fn decode_refuse(mut body: Body<'_>) -> Result<Refuse, MessageError> {
    let code = body.u16()?;
    let code = RefuseCode::from_number(code).ok_or_else(|| body.field("code"))?;
    body.take(2)?;
    let text = String::from_utf8_lossy(body.rest);
    // It goes into logs: what a peer sends must not forge lines there.
    let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Ok(Refuse { code, text })
}
