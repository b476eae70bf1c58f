//! Sessions over connections of the `redis` crate, pooled by r2d2, in the place of the crate's own pool:
//! `cargo run -p walferry-client --example redis_rs -- 127.0.0.1:6400`

use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use redis::{Cmd, ConnectionLike, Value};
use walferry_client::{Cluster, Connection, Pool, Reply, Route, Session};

/// How long an answer may take.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// A pool of r2d2 for each node.
#[derive(Default)]
struct RedisPool {
    nodes: Mutex<HashMap<String, r2d2::Pool<redis::Client>>>,
}

struct RedisConnection(r2d2::PooledConnection<redis::Client>);

impl Pool for RedisPool {
    type Connection = RedisConnection;

    fn get(&self, address: &str) -> io::Result<RedisConnection> {
        let mut nodes = self.nodes.lock().expect("nobody panics with it");
        if !nodes.contains_key(address) {
            let client = redis::Client::open(format!("redis://{address}")).map_err(io::Error::other)?;
            let builder = r2d2::Pool::builder().max_size(8).connection_timeout(Duration::from_secs(3));
            nodes.insert(address.to_owned(), builder.build_unchecked(client));
        }
        let pool = nodes[address].clone();
        // Others may go to other nodes while this one connects.
        drop(nodes);
        let connection = pool.get().map_err(io::Error::other)?;
        connection.set_read_timeout(Some(ANSWER_TIME_MAX)).map_err(io::Error::other)?;
        Ok(RedisConnection(connection))
    }
}

impl Connection for RedisConnection {
    fn pipeline(&mut self, commands: &[Vec<&[u8]>]) -> io::Result<Vec<Reply>> {
        let mut pipeline = redis::pipe();
        for command in commands {
            let words = command.iter().fold(Cmd::new(), |mut words, word| {
                words.arg(*word);
                words
            });
            pipeline.add_command(words);
        }
        let answers = self.0.req_packed_commands(&pipeline.get_packed_pipeline(), 0, commands.len());
        Ok(answers.map_err(io::Error::other)?.into_iter().map(reply).collect())
    }
}

fn reply(value: Value) -> Reply {
    match value {
        Value::Nil => Reply::Nil,
        Value::Int(number) => Reply::Int(number),
        Value::BulkString(bytes) => Reply::Text(bytes),
        Value::SimpleString(text) => Reply::Text(text.into_bytes()),
        Value::Okay => Reply::Text(b"OK".to_vec()),
        Value::Array(items) => Reply::Array(items.into_iter().map(reply).collect()),
        Value::ServerError(error) => Reply::Error(format!("{} {}", error.code(), error.details().unwrap_or_default())),
        other => Reply::Error(format!("ERR not an answer in RESP2: {other:?}")),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let seeds: Vec<String> = std::env::args().skip(1).collect();
    let cluster = Cluster::with_pool(RedisPool::default(), &seeds)?;
    let mut session = Session::new(&cluster);
    session.write(&["SET", "greeting", "hello"])?;
    let read = session.read(Route::Replica, &["GET", "greeting"])?;
    println!("{:?} from {}", read.text(), session.answered_by().unwrap_or_default());
    println!("token {}", session.token().unwrap_or_default());
    Ok(())
}
