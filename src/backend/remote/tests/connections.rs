//! What becomes of connections: how long is waited, what counts as nobody there, when they are closed and kept.

use super::*;

#[tokio::test]
async fn every_wait_has_its_limit() {
    let stalls_after = |text: String| async move {
        let text: Arc<str> = text.into();
        upstream(move |_, _, mut socket| {
            let text = Arc::clone(&text);
            async move {
                let _ = socket.write_all(text.as_bytes()).await;
                let _ = socket.read_u8().await;
            }
        })
        .await
    };
    let short = Duration::from_millis(30);
    let first: String = TRANSCRIPT.split_inclusive("\n\n").take(3).collect();
    let begun = chunked(&first).replace("0\r\n\r\n", "");
    for (sent, seen) in [(String::new(), 0), (events(""), 0), (begun, 2)] {
        let url = stalls_after(sent.clone()).await;
        let idle_timeout = Duration::from_millis(200);
        let first_byte_timeout = if seen == 0 { short } else { Duration::from_secs(600) };
        let config = RemoteConfig { first_byte_timeout, idle_timeout, ..remote(&url) };
        let (chunks, error) = collect(&RemoteBackend::new(config).unwrap(), call(BODY, true)).await;
        let error = error.unwrap();
        assert_eq!(error.kind, ErrorKind::Timeout, "{sent}");
        // The silence was noticed, not the far longer limit on the first byte.
        assert_eq!(error.message.contains("fell silent"), seen > 0, "{error}");
        assert_eq!(wires(&chunks).len(), seen);
        let config = RemoteConfig { total_timeout: Some(short), ..remote(&url) };
        let (_, error) = collect(&RemoteBackend::new(config).unwrap(), call(BODY, true)).await;
        assert_eq!(error.unwrap().kind, ErrorKind::Timeout, "{sent}");
    }
    let half = json("200 OK", "", r#"{"id":"x","choices":[]}"#);
    let url = stalls_after(half[..half.len() - 1].to_owned()).await;
    let config = RemoteConfig { idle_timeout: short, ..remote(&url) };
    let error = RemoteBackend::new(config).unwrap().start(call(BODY, false)).await.err().unwrap();
    assert_eq!(error.kind, ErrorKind::Timeout);
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let (_, error) = collect(&RemoteBackend::new(remote(&url)).unwrap(), call(BODY, true)).await;
    let error = error.unwrap();
    assert_eq!(error.kind, ErrorKind::Unreachable);
    assert!(error.message.contains("model `fast` at 127.0.0.1"), "{error}");
}

#[tokio::test]
async fn heartbeats_keep_a_stream_alive_that_has_begun() {
    let url = upstream(|_, _, mut socket| async move {
        let (begun, rest) = TRANSCRIPT.split_at(TRANSCRIPT.find("data: {\"id\":\"up-1\",\"choices\"").unwrap());
        socket.write_all(events(begun).as_bytes()).await.unwrap();
        // Together longer than the limit on silence, each far shorter.
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            socket.write_all(b": still here\n\n").await.unwrap();
        }
        socket.write_all(rest.as_bytes()).await.unwrap();
    })
    .await;
    let config = RemoteConfig { idle_timeout: Duration::from_secs(1), ..remote(&url) };
    let (chunks, error) = collect(&RemoteBackend::new(config).unwrap(), call(BODY, true)).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(wires(&chunks).len(), 3);
}

#[tokio::test]
async fn https_to_a_server_that_speaks_none_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        // The handshake's first flight is there; it is answered as a server without TLS does.
        let _ = socket.read_u8().await;
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_url = format!("https://{}", silent.local_addr().unwrap());
    match RemoteBackend::new(remote(&url)) {
        // A machine without trusted certificates is told what to install.
        Err(error) => assert!(error.kind() == "tls" && error.to_string().contains("ca-certificates"), "{error}"),
        Ok(backend) => {
            let (_, error) = collect(&backend, call(BODY, true)).await;
            let error = error.unwrap();
            assert_eq!(error.kind, ErrorKind::Unreachable, "{error}");
            // The kernel accepts; nobody shakes hands.
            let config = RemoteConfig { connect_timeout: Duration::from_millis(30), ..remote(&silent_url) };
            let (_, error) = collect(&RemoteBackend::new(config).unwrap(), call(BODY, true)).await;
            assert_eq!(error.unwrap().kind, ErrorKind::Unreachable);
        }
    }
}

#[tokio::test]
async fn leaving_closes_the_servers_connection() {
    let (tell, mut told) = mpsc::unbounded_channel();
    let url = upstream(move |number, _, mut socket| {
        let tell = tell.clone();
        async move {
            // The second one does not even begin to answer.
            let begun = chunked(TRANSCRIPT);
            let until = begun.find("up-1").unwrap();
            if number == 0 {
                let until = until + begun[until..].find("\n\n\r\n").unwrap() + 4;
                socket.write_all(&begun.as_bytes()[..until]).await.unwrap();
            }
            tell.send("asked").unwrap();
            // Nothing more is ever sent by the client: this returns when it has gone.
            let _ = socket.read_u8().await;
            tell.send("gone").unwrap();
        }
    })
    .await;
    let backend = Arc::new(RemoteBackend::new(remote(&url)).unwrap());
    let Ok(Reply::Stream { mut chunks, .. }) = backend.start(call(BODY, true)).await else { panic!("no stream") };
    assert!(matches!(chunks.next().await, Some(Ok(Chunk::Wire(_)))));
    assert_eq!(told.recv().await, Some("asked"));
    assert_eq!(backend.state().running, 1);
    drop(chunks);
    assert_eq!(told.recv().await, Some("gone"));
    assert_eq!(backend.state().running, 0);

    let waiting = tokio::spawn({
        let backend = Arc::clone(&backend);
        async move { backend.start(call(BODY, true)).await.map(|_| ()) }
    });
    assert_eq!(told.recv().await, Some("asked"));
    waiting.abort();
    assert_eq!(told.recv().await, Some("gone"));
}

#[tokio::test]
async fn connections_are_kept_although_the_bodys_end_comes_late() {
    let connections = Arc::new(AtomicUsize::new(0));
    let url = upstream({
        let connections = Arc::clone(&connections);
        move |_, _, mut socket| {
            connections.fetch_add(1, Ordering::Relaxed);
            async move {
                let whole = chunked(TRANSCRIPT);
                loop {
                    let (answer, end) = whole.split_at(whole.len() - 5);
                    socket.write_all(answer.as_bytes()).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    socket.write_all(end.as_bytes()).await.unwrap();
                    if receive(&mut socket).await.is_none() {
                        return;
                    }
                }
            }
        }
    })
    .await;
    let backend = RemoteBackend::new(remote(&url)).unwrap();
    for _ in 0..10 {
        let (_, error) = collect(&backend, call(BODY, true)).await;
        assert!(error.is_none(), "{error:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(connections.load(Ordering::Relaxed) < 10, "no connection was used twice");
}
