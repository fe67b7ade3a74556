import http.client,json,sys,time,statistics,random
ports=[int(p) for p in sys.argv[1:]]
random.seed(3)
words="river stone light paper engine garden window silver morning letter bridge market winter forest copper".split()
system="You are a careful assistant of a small library. "+" ".join(random.choice(words) for _ in range(85))+"."
def ask(port,sys_,q):
    c=http.client.HTTPConnection('127.0.0.1',port)
    m=([{"role":"system","content":sys_}] if sys_ else [])+[{"role":"user","content":q}]
    t=time.perf_counter()
    c.request('POST','/v1/chat/completions',json.dumps({"model":"smollm2-135m-instruct","messages":m,"max_tokens":4,"stream":True,"stream_options":{"include_usage":True}}),{'content-type':'application/json'})
    r=c.getresponse(); first=None; usage=None
    for line in r:
        if line.startswith(b'data: {'):
            d=json.loads(line[6:])
            if first is None and d.get('choices') and d['choices'][0]['delta'].get('content'): first=time.perf_counter()-t
            if d.get('usage'): usage=d['usage']
    c.close(); return first*1e3,usage
for name,sys_ in (("shared beginning of about 100 tokens",system),("nothing shared",None)):
    got={p:[] for p in ports}; use={}
    for i in range(41):
        for p in ports:
            q=" ".join(random.choice(words) for _ in range(12)) if sys_ else str(random.random())+" ".join(random.choice(words) for _ in range(90))
            t,u=ask(p,sys_,q); 
            if i: got[p].append(t)
            use[p]=u
    for p in ports: print(f"{name}, port {p}: median ttft {statistics.median(got[p]):.1f} ms, last usage {use[p]}")
