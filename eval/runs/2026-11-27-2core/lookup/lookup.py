import json, subprocess, sys, time, urllib.request, statistics, tempfile, os
W="/work/main/target/release/weir"; H="/work/main/target/weir-home"
procs=[]
def start(port, extra):
    d=tempfile.mkdtemp()
    cfg=f"{d}/weir.yaml"
    open(cfg,"w").write(f"fleet:\n  - name: m\n    local: {{model: {H}/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf, threads: 2{extra}}}\n")
    open(f"{d}/p.yaml","w").write("policy: p\nmodels:\n  m: {name: m}\nselect:\n  arms: [m]\n  static: {m: 1}\n")
    open(cfg,"a").write(f"policies: [{d}/p.yaml]\n")
    p=subprocess.Popen([W,"serve","--config",cfg,"--listen",f"127.0.0.1:{port}","--data-dir",f"{d}/data"],stdout=subprocess.DEVNULL,stderr=open(f"/tmp/lk{port}.log","w"),env={**os.environ,"WEIR_HOME":H})
    procs.append(p)
def ask(port, text, n=160):
    body=json.dumps({"model":"m","temperature":0,"max_tokens":n,"messages":[{"role":"user","content":text}]}).encode()
    r=urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions",body,{"content-type":"application/json"})
    t=time.perf_counter(); a=json.load(urllib.request.urlopen(r)); dt=time.perf_counter()-t
    return a["choices"][0]["message"]["content"], a["usage"]["completion_tokens"], dt
start(18091, ""); start(18092, ", prompt_lookup: 0")
for port in (18091,18092):
    for _ in range(20):
        try: ask(port,"hi",1); break
        except Exception: time.sleep(.5)
doc="The ferry to the northern island leaves at seven in the morning and at four in the afternoon. Tickets cost nine pounds for adults and four pounds for children under twelve. Dogs travel free, but bicycles need a reservation at least one day before. In winter there is only the morning boat, and none at all when the wind is above force eight."
cases={"repeat a text":"Repeat the following text exactly, word for word:\n\n"+doc,
 "fix a word":"Replace the word ferry by the word ship in this text and give the whole text back:\n\n"+doc,
 "a story":"Write a short story about a lighthouse keeper.",
 "explain":"Explain how a bicycle stays upright."}
out=[]
for name,text in cases.items():
    a,b=[],[]
    for _ in range(7):
        x=ask(18091,text); y=ask(18092,text); assert x[0]==y[0], (name,x,y)
        a.append(x[2]); b.append(y[2])
    out.append({"case":name,"tokens":x[1],"with_ms":round(1e3*statistics.median(a)),"without_ms":round(1e3*statistics.median(b)),"ratio":round(statistics.median(b)/statistics.median(a),2)})
    print(out[-1], flush=True)
print(json.dumps(out),file=open("/tmp/lookup.json","w"))
for p in procs: p.terminate()
